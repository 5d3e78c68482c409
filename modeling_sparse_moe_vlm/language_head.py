"""The language head: logits, losses, and generation with modality weights."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .cache_name import CACHE_NAME
from .fused_head import takes_fused_head, with_own_router_losses
from .input_checks import check_labels, keep_positions
from .losses import add_router_losses
from .outputs import SparseMoeVlmCausalLMOutputWithPast, SparseMoeVlmTextModelOutputWithPast
from .pretrained import SparseMoeVlmPreTrainedModel
from .steering import check_steering_arguments
from .token_modalities import TokenModalities, ids_of_step

# The model whose `generate` returns modality weights, and the weights of the steps so far.
_read_out: ContextVar[tuple[Any, list[dict[str, tuple[torch.Tensor, ...]]]]] = ContextVar(
    "_read_out", default=(None, [])
)


class SparseMoeVlmLanguageHead(SparseMoeVlmPreTrainedModel, GenerationMixin):
    """Base class of the models with a language head: logits, language loss and router losses."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __setattr__(self, name: str, value: Any) -> None:
        """Same as in torch, but adds the router losses to the `forward` that TRL trainers assign to a model."""
        if name == "forward" and takes_fused_head(value):
            value = with_own_router_losses(self, value)
        super().__setattr__(name, value)

    def generate(self, *args, output_modality_weights: bool = False, **kwargs):
        """
        Generates token ids: see [`~transformers.GenerationMixin.generate`].

        Args:
            args (`Any`):
                Arguments of [`~transformers.GenerationMixin.generate`].
            output_modality_weights (`bool`, *optional*, defaults to `False`):
                Whether to also return `modality_weights` and `count_free_modality_weights`, the weights of the
                attention parts. Each has an entry per step, which is a tuple with one tensor
                `(rows, heads, T, num_modalities)` per layer. T is the length of the prompt in the first step and 1 in
                later steps (in assisted decoding, the number of accepted candidates plus 1). Requires
                `return_dict_in_generate=True`.
            kwargs (`Any`):
                Other arguments of [`~transformers.GenerationMixin.generate`], inputs of the model, and the steering
                arguments `modality_priors` and `modality_guidance` (see
                [`SparseMoeVlmForConditionalGeneration.forward`]).

        Returns:
            `ModelOutput` or `torch.LongTensor`: The generated token ids, or with `return_dict_in_generate=True` an
            output that also has other fields.

        Raises:
            ValueError: If `output_modality_weights=True` is passed without `return_dict_in_generate=True`, or if a
                steering argument is misspelt.
        """
        check_steering_arguments(kwargs)
        if not output_modality_weights:
            return super().generate(*args, **kwargs)
        # Not passed as an argument of the model, because it would also be passed to assistant models.
        token = _read_out.set((self, []))
        try:
            outputs = super().generate(*args, **kwargs)
            _, read_out = _read_out.get()
        finally:
            _read_out.reset(token)
        if not isinstance(outputs, ModelOutput):
            raise ValueError("`output_modality_weights=True` needs `return_dict_in_generate=True`.")
        for name in ("modality_weights", "count_free_modality_weights"):
            outputs[name] = tuple(step[name] for step in read_out)
        return outputs

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """Same as in Transformers, but a `max_length` of the call overrides `max_new_tokens` of the checkpoint."""
        given = generation_config or GenerationConfig()
        max_length, max_new_tokens = (
            kwargs.get(name, getattr(given, name)) for name in ("max_length", "max_new_tokens")
        )
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if max_length is not None and max_new_tokens is None:
            prepared.max_new_tokens = None
        return prepared, model_kwargs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, num_new_tokens: int = 1, **kwargs):
        """Same as in Transformers, but also stores the modality weights of the tokens that this step has added."""
        model, read_out = _read_out.get()
        if model is self:
            # The logits are those of the last token and of all candidates.
            num_refused = outputs.logits.shape[1] - num_new_tokens
            read_out.append(
                {
                    name: tuple(weights[:, :, : weights.shape[2] - num_refused] for weights in outputs[name])
                    for name in ("modality_weights", "count_free_modality_weights")
                }
            )
        return super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, mm_token_type_ids=None, **kwargs):
        """Same as in Transformers, but passes the modality ids of this step in all releases and decoding modes."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if _read_out.get()[0] is self:
            model_inputs["output_modality_weights"] = True
        if mm_token_type_ids is not None:
            prompt = model_inputs.get("inputs_embeds")
            tokens = model_inputs["input_ids"] if prompt is None else prompt
            model_inputs["mm_token_type_ids"] = ids_of_step(mm_token_type_ids, input_ids, tokens)
        return model_inputs

    def _head(
        self,
        outputs: SparseMoeVlmTextModelOutputWithPast,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        tokens: TokenModalities,
        wants_router_losses: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseMoeVlmCausalLMOutputWithPast:
        """Computes the logits and, if they are needed, the language loss and the router losses."""
        text_config = self.config.get_text_config()
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        losses: dict[str, torch.Tensor] = {}
        # `config.output_router_logits` must not slow down inference: the losses are computed only for training and on
        # request.
        if outputs.router_logits and (wants_router_losses or labels is not None or self.training):
            loss, losses = add_router_losses(
                text_config,
                outputs.router_logits,
                outputs.router_indices,
                tokens,
                loss=loss,
                labels=labels,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                is_asked_for=wants_router_losses,
            )
        return SparseMoeVlmCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            router_dropped=outputs.router_dropped,
            image_outputs=outputs.get("image_outputs"),
            modality_weights=outputs.modality_weights,
            count_free_modality_weights=outputs.count_free_modality_weights,
            **losses,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
