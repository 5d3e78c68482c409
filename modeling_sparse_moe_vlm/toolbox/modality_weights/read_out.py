"""Reads and steers the attention weights of modalities (α: image, β: text) in Transformers vision-language models.

```python
with modality_weights(model) as weights:
    model.generate(**inputs)
weights.alpha  # share of each head's attention that went to the image, by layer and token
```

The weight of a modality is the share of attention that its keys receive (D-Attn, arXiv 2502.01906). Any attention
backend can compute it: if the values are replaced by an indicator of the modality, attention returns the weights. This
is an additional call; the model's own call of its backend does not change. Steering replaces the model's own call by
[`~modeling_sparse_moe_vlm.distributed_attention.attend_by_channels`].
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ...cache_name import CACHE_NAME
from ...checks import check
from ...distributed_attention import Merged, attend_by_channels, count_free
from ...steering import check_guidance, given_log_priors
from ...visible_keys import visible_counts
from ..expert_modules import base_model_of, our_experts_config
from .interception import AttentionFunction, Interception, intercept_attention

# The position is the modality id, as in `ProcessorMixin.create_mm_token_type_ids`.
MODALITIES = ("text", "image", "video", "audio")
# Models that use the new name still accept the old one.
_CACHE_NAMES = {CACHE_NAME, "past_key_values"}


@dataclass
class Step:
    """
    The modality weights of one forward pass over B rows of T tokens, in a model with H heads. M = `len(MODALITIES)`.

    Args:
        start (`int`):
            Number of tokens in the key/value cache before the pass.
        modality_ids (`torch.Tensor` of shape `(B, T)`):
            Modality id of every token, an index into `MODALITIES`.
        modality_weights (`dict[int, torch.Tensor]`):
            Modality weights, by number of the layer: tensors `(B, H, T, M)` of type float32. If a layer skips the first
            tokens, its tensor has fewer than T.
        count_free_modality_weights (`dict[int, torch.Tensor]`):
            Count-free modality weights, in the same form. They do not depend on the number of tokens of each modality.
    """

    start: int
    modality_ids: torch.Tensor
    modality_weights: dict[int, torch.Tensor] = field(default_factory=dict)
    count_free_modality_weights: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class ModalityWeights:
    """
    The modality weights that [`modality_weights`] has read.

    Args:
        steps (`list[Step]`):
            One entry for every forward pass of the model, in order.
    """

    steps: list[Step] = field(default_factory=list)

    def of(self, modality: str, *, count_free: bool = False) -> torch.Tensor:
        """
        Returns the weights of a modality for the last sequences, concatenated over their forward passes. Tokens that
        assisted decoding rejected are left out.

        Args:
            modality (`str`):
                Name of the modality, one of `MODALITIES`.
            count_free (`bool`, *optional*, defaults to `False`):
                Whether to return the count-free weights, which do not grow with the number of tokens of the modality.

        Returns:
            `torch.Tensor` of shape `(layers, B, H, T)`: Weights of type float32. They are NaN for tokens that a layer
            skips (Gemma 4 runs its last layers only on the last token of a prompt).

        Raises:
            ValueError: If there is no such modality, or if nothing has been read out.
        """
        check(modality in MODALITIES, f"`modality` must be one of {', '.join(MODALITIES)}, got {modality!r}.")
        check(
            bool(self.steps),
            "nothing has been read out: run the model first, in the thread that has entered `modality_weights`.",
        )
        column = MODALITIES.index(modality)
        whole, begin = torch.empty(0), self.steps[0].start
        for step in self.steps:
            layers = step.count_free_modality_weights if count_free else step.modality_weights
            length = step.modality_ids.shape[1]
            weights = torch.stack([_fill(layers[layer][..., column], length) for layer in sorted(layers)])
            if step.start <= begin:  # another sequence
                whole, begin = weights, step.start
            else:
                whole = torch.cat([whole[..., : step.start - begin], weights], dim=-1)
        return whole

    @property
    def alpha(self) -> torch.Tensor:
        """Weights of images, `(layers, B, H, T)`: see [`~ModalityWeights.of`]."""
        return self.of("image")

    @property
    def beta(self) -> torch.Tensor:
        """Weights of text, `(layers, B, H, T)`: see [`~ModalityWeights.of`]."""
        return self.of("text")


@contextmanager
def modality_weights(
    model: PreTrainedModel,
    *,
    modality_priors: Mapping[str, float] | None = None,
    modality_guidance: float = 0.0,
    modality_ids: torch.Tensor | None = None,
) -> Iterator[ModalityWeights]:
    """
    A context that reads, and optionally steers, the attention of a vision-language model without changing the model.

    It works for every model whose language model takes its attention function from `ALL_ATTENTION_FUNCTIONS` and
    represents an image as tokens of its sequence. Without steering, the output of the model is bit-identical. A
    compiled model runs uncompiled in this context.

    The context applies to the thread that enters it. Other threads can run the same model at the same time, with or
    without a context of their own. A thread that you start inside the context (to stream the output of `generate`, for
    example) does not inherit it. Start it with
    `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)`, and join it before you leave
    the context.

    Args:
        model (`PreTrainedModel`):
            The model, with or without adapters. In the context, call it directly or through its `generate`.
        modality_priors (`Mapping[str, float]`, *optional*):
            Factors by which to multiply the prior weights of modalities, such as `{"image": 2.0}`.
        modality_guidance (`float`, *optional*, defaults to 0.0):
            Strength g of the guidance: the attention output Z becomes Z + g·(Z − O_text), where O_text is the output
            over text keys only (arXiv 2601.13707). It applies to queries that see text and at least one other modality.
            At most 100; 0 disables it.
        modality_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Modality ids of the first T tokens of every sequence, each an index into `MODALITIES`. Later tokens are
            text. By default, the placeholders in `input_ids` define the modalities; if they cannot, the
            `mm_token_type_ids` that the model receives do.

    Yields:
        [`ModalityWeights`]: The weights. Every forward pass adds a [`Step`], without gradients.

    Raises:
        ValueError: On entry, if an argument is invalid, if the attention of the model is already read or steered in
            this thread, or if its attention backend is not registered. In a forward pass, if the modality ids are
            unknown or do not fit the keys of a layer, if steering is not possible, or if two threads share the context.
            On exit, if a forward pass of another thread in the context has not ended.

    Warns:
        UserWarning: If no forward pass was read because only other threads ran the model.
    """
    log_priors = given_log_priors(MODALITIES, modality_priors)
    check_guidance(modality_guidance)
    if modality_ids is not None:
        check(
            modality_ids.dim() == 2 and bool((modality_ids >= 0).all() and (modality_ids < len(MODALITIES)).all()),
            f"`modality_ids` must be of shape (B, T), from 0 to {len(MODALITIES) - 1} ({', '.join(MODALITIES)}).",
        )
    model = base_model_of(model)
    decoder = model.get_decoder()
    recorder = _Recorder(model.config, log_priors, modality_guidance, modality_ids)
    attention = decoder.config._attn_implementation
    with intercept_attention(set(decoder.modules()), attention, recorder.attend) as recorder.interception:
        # Direct calls and `generate` both call the base model.
        with (
            model.base_model.register_forward_pre_hook(recorder.start, with_kwargs=True),
            model.base_model.register_forward_hook(recorder.finish, always_call=True),
        ):
            yield recorder.weights
        recorder.close()


@dataclass
class _Pass:
    """A forward pass in progress, with the modality ids of the cached and the new tokens, `(B, S)`."""

    step: Step
    token_ids: torch.Tensor
    cache: Cache | None
    steers: bool


class _Recorder:
    """Records the forward passes of a model in the threads where its interception applies."""

    interception: Interception

    def __init__(
        self, config: PreTrainedConfig, log_priors: list[float], guidance: float, modality_ids: torch.Tensor | None
    ):
        self.weights = ModalityWeights()
        self.model_type = config.model_type
        self.placeholders = placeholders_of(config)
        self.log_priors = torch.tensor(log_priors)
        self.guidance = guidance
        self.steers = guidance > 0 or len(set(log_priors)) > 1  # only the ratios of priors matter
        self.modality_ids = modality_ids
        self.thread: int | None = None  # of the pass in progress
        self.running: _Pass | None = None
        self.num_passes_elsewhere = 0
        self.lock = threading.Lock()

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called before a forward pass: determines the modality ids of its tokens and of the cached tokens."""
        if not self.interception.is_here():
            check(
                not getattr(module, "_is_replica", False),
                "`DataParallel` runs copies of the model in its own threads, which are neither read out nor steered: "
                "call the model that it wraps.",
            )
            self.num_passes_elsewhere += 1
            return
        with self.lock:
            check(
                self.thread in (None, threading.get_ident()),
                "another thread runs the model in the same `modality_weights`: enter one in each thread.",
            )
            self.thread = threading.get_ident()
        check(
            not (self.steers and module.training and getattr(module, "is_gradient_checkpointing", False)),
            "gradient checkpointing computes layers a second time, which cannot be steered: call `model.eval()` or "
            "`model.gradient_checkpointing_disable()`.",
        )
        arguments = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        cache = next((arguments[name] for name in _CACHE_NAMES if arguments.get(name) is not None), None)
        check(cache is None or isinstance(cache, Cache), f"a cache of type {type(cache).__name__} is not supported.")
        start = 0 if cache is None else int(cache.get_seq_length())
        new_ids = self._ids_of_tokens(arguments, start)
        token_ids = new_ids if start == 0 else torch.cat([_ids_of_cache(cache, start, len(new_ids)), new_ids], dim=1)
        # With a single modality, its weight is 1 for any prior.
        steers = self.steers and bool((token_ids != token_ids[:1, :1]).any())
        self.running = _Pass(Step(start, new_ids), token_ids, cache, steers)

    def attend(
        self,
        backend: AttentionFunction,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Replaces the attention function of a layer."""
        running = self.running if self.thread == threading.get_ident() else None
        if running is None:  # a layer called directly, or recomputed by gradient checkpointing
            check(not self.steers, "only calls of the model that was passed to `modality_weights` can be steered.")
            return backend(module, query, key, value, attention_mask, **kwargs)
        step = running.step
        key_ids = _ids_of_keys(running, module, key)
        if running.steers:
            merged = self._steer(backend, module, query, key, value, attention_mask, key_ids, **kwargs)
        else:
            output, attentions = backend(module, query, key, value, attention_mask, **kwargs)
            indicator = F.one_hot(key_ids, value.shape[-1])[:, None].to(value.dtype).expand(value.shape)
            # Dropout would advance the random numbers of the model. Gradients would make gradient checkpointing compute
            # the weights again.
            with torch.no_grad():
                shares, _ = backend(module, query, key, indicator, attention_mask, **kwargs | {"dropout": 0.0})
            merged = Merged(output, shares[..., : len(MODALITIES)].float().transpose(1, 2), attentions)
        weights = cast(torch.Tensor, merged.weights).detach()
        counts = _visible_counts(step, module, query, attention_mask, key_ids, **kwargs)
        step.modality_weights[module.layer_idx] = weights
        step.count_free_modality_weights[module.layer_idx] = count_free(weights, counts)
        return merged.output, merged.attentions

    def finish(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Called after a forward pass, and after a pass that failed, without an output."""
        if self.thread != threading.get_ident():
            return
        running, self.running, self.thread = self.running, None, None
        if running is None or output is None:
            return
        check(
            bool(running.step.modality_weights),
            f"no layer of {self.model_type!r} used the attention function from `ALL_ATTENTION_FUNCTIONS` that was set "
            "when `modality_weights` was entered: set the attention implementation before you enter it.",
        )
        self.weights.steps.append(running.step)
        cache = getattr(output, CACHE_NAME, None) if running.cache is None else running.cache
        if cache is not None:
            cache.token_modality_ids = running.token_ids

    def close(self) -> None:
        """Called on exit, unless an error ends the context: checks that everything was read out."""
        check(
            self.thread in (None, threading.get_ident()),
            "a forward pass of another thread had not ended when `modality_weights` was left: join the thread before "
            "you leave the context.",
        )
        if self.num_passes_elsewhere and not self.weights.steps:
            warnings.warn(
                f"`modality_weights` has neither read out nor steered anything: all {self.num_passes_elsewhere} "
                "forward passes of the model ran in other threads. To include them, start the thread with "
                "`Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)`, or enter "
                "`modality_weights` in it.",
                stacklevel=4,
            )

    def _ids_of_tokens(self, arguments: Mapping[str, Any], start: int) -> torch.Tensor:
        """Returns the modality ids of the tokens of a call, `(B, T)`."""
        input_ids: Any = arguments.get("input_ids")
        tokens: Any = arguments.get("inputs_embeds") if input_ids is None else input_ids
        check(tokens is not None, "the model needs `input_ids` or `inputs_embeds`.")
        num_rows, length = tokens.shape[:2]
        if self.modality_ids is not None:
            ids = self.modality_ids[:, start : start + length].to(tokens.device)
            check(num_rows % len(ids) == 0, f"`modality_ids` has {len(ids)} rows, the call has {num_rows}.")
            ids = ids.repeat_interleave(num_rows // len(ids), dim=0)  # beams
            return F.pad(ids, (0, length - ids.shape[1]))
        if start and length == 1:  # a placeholder that the model generates has no image features
            return torch.zeros(num_rows, 1, dtype=torch.long, device=tokens.device)
        if input_ids is not None and self.placeholders:
            ids = torch.zeros_like(input_ids)
            for token_id, modality_id in self.placeholders.items():
                ids = ids.masked_fill(input_ids == token_id, modality_id)
            return ids
        given: Any = arguments.get("mm_token_type_ids")
        check(
            given is not None,
            f"which tokens are images is not known from `input_ids` and the configuration of {self.model_type!r} "
            "(`image_token_id`): pass `modality_ids` to `modality_weights`.",
        )
        return given[:, -length:].long()

    def _steer(
        self,
        backend: AttentionFunction,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        key_ids: torch.Tensor,
        *,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Merged:
        if kwargs.get("softcap") is not None:
            backend = _cap_without_priors(backend, query.shape[-1])
        return attend_by_channels(
            backend, module, query, key, value, attention_mask, key_ids, len(MODALITIES),
            log_priors=self.log_priors.to(query.device).expand(query.shape[1], -1), guidance=self.guidance,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, **kwargs,
        )  # fmt: skip


def _fill(weights: torch.Tensor, length: int) -> torch.Tensor:
    """Pads with NaN the first tokens, which a layer has skipped."""
    return F.pad(weights, (length - weights.shape[-1], 0), value=torch.nan)


def placeholders_of(config: PreTrainedConfig) -> dict[int, int]:
    """Returns the modality id of every placeholder token, by token id."""
    of_experts = getattr(our_experts_config(config), "placeholder_ids", {})
    placeholders = {
        token_id: MODALITIES.index(modality)
        for modality, token_ids in of_experts.items()
        if modality in MODALITIES
        for token_id in token_ids
    }
    for modality_id, modality in enumerate(MODALITIES):
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            token_id = getattr(config, name, None)
            if token_id is not None:
                placeholders[token_id] = modality_id
    return placeholders


def _ids_of_cache(cache: Cache, length: int, num_rows: int) -> torch.Tensor:
    """Returns the modality ids of the cached tokens, `(B, length)`, which are stored in the cache object."""
    ids: Any = getattr(cache, "token_modality_ids", None)
    check(
        ids is not None and ids.shape[1] >= length and len(ids) == num_rows,
        "the cache was filled, or its rows were changed, outside of `modality_weights`, so the modality ids of its "
        "tokens are not known. Run the model in this context from the first token on.",
    )
    return ids[:, :length]


def _ids_of_keys(running: _Pass, module: nn.Module, key: torch.Tensor) -> torch.Tensor:
    """Returns the modality ids of the keys of a layer, `(B, S)`."""
    ids, cache = running.token_ids.to(key.device), running.cache
    room = key.shape[2] - ids.shape[1]
    # A static cache has empty positions at its end, which the mask hides. A sliding cache has dropped its first keys.
    explained = room == 0 or (cache is not None and (cache.is_compileable if room > 0 else any(cache.is_sliding)))
    check(
        explained and len(key) == len(ids),
        f"layer {module.layer_idx} ({type(module).__name__}) attends to {key.shape[2]} keys in {len(key)} rows, but "
        f"the model received {ids.shape[1]} tokens in {len(ids)} rows: cross-attention and virtual tokens are not "
        "supported.",
    )
    return F.pad(ids, (0, room)) if room >= 0 else ids[:, -room:]


def _visible_counts(
    step: Step,
    module: nn.Module,
    query: torch.Tensor,
    attention_mask: Any,
    key_ids: torch.Tensor,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Returns the number of keys of each modality that a query sees, `(B, T, M)`."""
    num_rows, length, num_keys = len(query), query.shape[2], key_ids.shape[1]
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not is_causal and length > 1:
            attention_mask = key_ids.new_ones(num_rows, 1, length, num_keys, dtype=torch.bool)
        elif step.start:
            attention_mask = torch.ones_like(key_ids)
    return visible_counts(attention_mask, key_ids, length, len(MODALITIES), sliding_window=sliding_window)


def _cap_without_priors(backend: AttentionFunction, head_dim: int) -> AttentionFunction:
    """
    Wraps a backend so that the cap applies to the logits but not to the priors. The priors are in the channels after
    `head_dim`; they are moved to the mask, which is added after the cap.
    """

    def attention(module, query, key, value, attention_mask, **kwargs):
        check(
            torch.is_tensor(attention_mask) and attention_mask.is_floating_point(),
            'only eager attention can steer soft-capped logits: call `model.set_attn_implementation("eager")` first.',
        )
        # All key heads have the same channels.
        priors = query[..., head_dim:] @ key[:, :1, :, head_dim:].mT * kwargs["scaling"]
        query, key = query[..., :head_dim], key[..., :head_dim]
        return backend(module, query, key, value, attention_mask + priors, **kwargs)

    return attention
