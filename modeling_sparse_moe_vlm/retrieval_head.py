"""The head of retrieval models: embeddings of texts, images, and texts with images, and the contrastive loss."""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .checks import check
from .contrastive import at_most, contrastive_loss, pool_tokens, truncate
from .experts_config import experts_config_of
from .losses import add_router_losses
from .outputs import SparseMoeVlmRetrievalOutput
from .routing import RoutingRecord
from .sentence_transformers_files import write_files

# The largest factor of the similarities, as in CLIP.
MAX_LOGIT_SCALE = math.log(100.0)


class ImageTextRetrievalMixin:
    """
    Base class of the retrieval models. A subclass sets `self.model`, the model without a language head that computes
    the hidden states, and calls `add_head`.
    """

    # `Trainer` divides the loss by the number of micro-batches, because it is a mean over a micro-batch.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    config: Any
    model: Any

    def add_head(self) -> None:
        """Creates the parameters of the contrastive loss."""
        # One-dimensional, because FSDP2 does not shard scalars.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if self.config.contrastive_loss == "sigmoid" else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if module is self:
            init.constant_(self.logit_scale, self.config.initial_logit_scale)
            if self.logit_bias is not None:
                init.constant_(self.logit_bias, self.config.logit_bias_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """Returns `None`: there is no language head."""
        return None

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        embedding_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Embeds texts, or texts with images.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`):
                Token ids, as the chat template returns them (see [`~toolbox.retrieval.retrieval_inputs`]).
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 for padding, which can be on either side.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Positions of the tokens.
            embedding_size (`int`, *optional*):
                Number of components to keep, such as one of `config.matryoshka_dims`. Defaults to all.
            kwargs (`Any`):
                Other inputs of the model, such as `pixel_values` for texts with images.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The embeddings as `pooler_output`, a float32
            tensor of shape `(B, embedding_size)` whose rows have the length 1, and the hidden states of the tokens as
            `last_hidden_state`.

        Raises:
            ValueError: If `embedding_size` is out of range, or for the reasons that the model itself raises it.
        """
        hidden_states, embeddings, _ = self._embed(
            embedding_size,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=embeddings)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        embedding_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Embeds images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`):
                The images, as returned by the image processor.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Only for compatibility with CLIP: the processor resizes images to the size of the vision tower.
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids with the placeholders of the images. By default, each image is embedded in the prompt
                `config.image_prompt_ids`.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 for padding in `input_ids`.
            embedding_size (`int`, *optional*):
                See [`~retrieval_head.ImageTextRetrievalMixin.get_text_features`].
            kwargs (`Any`):
                Other inputs of the model.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The embeddings as `pooler_output`, see
            [`~retrieval_head.ImageTextRetrievalMixin.get_text_features`].

        Raises:
            ValueError: If `interpolate_pos_encoding` is `True`, if `embedding_size` is out of range, or if
                `input_ids` is needed (see `config.image_prompt_ids`).
        """
        check(not interpolate_pos_encoding, "`interpolate_pos_encoding=True` is not supported: use the processor.")
        if input_ids is None:
            input_ids = self._image_prompts(pixel_values)
        hidden_states, embeddings, _ = self._embed(
            embedding_size, input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, **kwargs
        )
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        is_document: torch.Tensor | None = None,
        embedding_size: int | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseMoeVlmRetrievalOutput:
        r"""
        Embeds a batch of texts, images, and texts with images, and computes the contrastive loss.

        All queries and documents are rows of one batch, as [`~toolbox.data.RetrievalCollator`] makes it. The model can
        also be called like CLIP, with the token ids of texts without placeholders and the `pixel_values` of images. The
        images are then further rows, in the prompt `config.image_prompt_ids`.

        With several processes, the loss compares the rows of all processes, so all of them must call the model with
        labels, and the loss is the same in all of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids. Can be left out if there are only images, given as `pixel_values`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of the batch, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 for padding, which can be on either side.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Positions of the tokens.
            return_loss (`bool`, *optional*):
                Whether to compute the loss. By default, it is computed if there are `labels`. In a call as of CLIP
                without labels, the first text belongs to the first image, and so on.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Modality id of every token. Derived from the placeholders by default.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                A query and a document with the same label belong together; all other pairs are negatives. -1 is a hard
                negative, which has no partner. Labels below -1 are only unique within a process, and do not match those
                of other processes.
            is_document (`torch.BoolTensor` of shape `(B,)`, *optional*):
                Which rows are documents, such as images; the others are queries, such as texts. By default, rows with
                images are documents.
            embedding_size (`int`, *optional*):
                Number of components of the returned embeddings, such as one of `config.matryoshka_dims`. Defaults to
                all. It does not affect the loss.
            output_router_logits (`bool`, *optional*, defaults to the setting of the experts' configuration):
                Whether to return the router logits and losses and, with a loss, to add the router losses to it.
            kwargs (`Any`):
                Other inputs of the model that computes the hidden states.

        Returns:
            [`~outputs.SparseMoeVlmRetrievalOutput`]: The embeddings, and the loss if there are labels.

        Raises:
            ValueError: If neither texts nor images are given, if the loss lacks labels, if the shape of `labels` or
                `is_document` does not match the rows, or if `embedding_size` is out of range.
        """
        has_images = pixel_values is not None and pixel_values.numel() > 0
        check(
            input_ids is not None or has_images or kwargs.get("inputs_embeds") is not None,
            "pass `input_ids`, `pixel_values`, or both.",
        )
        if has_images and (input_ids is None or not self._has_images(input_ids).any()):
            joined = self._join(input_ids, pixel_values, attention_mask, position_ids)
            input_ids, attention_mask, num_texts = joined
            position_ids = mm_token_type_ids = None
            if is_document is None:
                is_document = torch.arange(len(input_ids), device=input_ids.device) >= num_texts
            if return_loss and labels is None:
                labels = _pair_up(num_texts, len(input_ids) - num_texts).to(input_ids.device)
        if is_document is None and input_ids is not None:
            is_document = self._has_images(input_ids)
        if return_loss is None:
            return_loss = labels is not None
        check(labels is not None or not return_loss, "`return_loss=True` needs `labels`.")
        hidden_states, embeddings, outputs = self._embed(
            embedding_size,
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_token_type_ids=mm_token_type_ids,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        for name, values in (("labels", labels), ("is_document", is_document)):
            check(
                values is None or values.shape == embeddings.shape[:1],
                f"`{name}` must have one value for each of the {len(embeddings)} rows, but has the shape "
                f"{None if values is None else tuple(values.shape)}.",
            )
        of_sides: dict[str, Any] = self._compare(embeddings, is_document)
        loss = None
        if return_loss:
            check(is_document is not None, "the loss needs `is_document`, unless there are `input_ids`.")
            loss = self._contrastive_loss(hidden_states, attention_mask, labels, is_document)
        losses: dict[str, Any] = {}
        record: RoutingRecord | None = outputs.pop("routing_record")
        routing: dict[str, Any] = {} if record is None else dict(record.outputs())
        wants_losses = bool(output_router_logits)
        # As in the models with a language head, router losses are only computed for training and on request.
        if routing.get("router_logits") and (wants_losses or loss is not None or self.training):  # type: ignore[attr-defined]
            assert record is not None
            assert record.tokens is not None
            loss, losses = add_router_losses(
                experts_config_of(self.config),
                routing["router_logits"],
                routing["router_indices"],
                record.tokens,
                loss=loss,
                labels=labels,
                num_items_in_batch=None,
                is_asked_for=wants_losses,
            )
        return SparseMoeVlmRetrievalOutput(
            loss=loss,
            embeddings=embeddings,
            last_hidden_state=hidden_states,
            **of_sides,
            **outputs,
            **routing,
            **losses,
        )

    def _embed(self, embedding_size: int | None, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Returns the hidden states, the embeddings, and other outputs with the routing record."""
        experts_config = experts_config_of(self.config)
        returns_routing = inputs.pop("output_router_logits", None)
        if returns_routing is None:
            returns_routing = experts_config.output_router_logits
        record = inputs.pop("routing_record", None)  # passed by tools that observe the routing
        if record is None and returns_routing:
            record = RoutingRecord()
        for name in ("return_dict", "return_loss", "use_cache"):
            inputs.pop(name, None)
        given = {name: value for name, value in inputs.items() if value is not None}
        observed = {} if record is None else {"routing_record": record}
        outputs = self.model(**given, **observed, use_cache=False, output_router_logits=False, return_dict=True)
        hidden_states = outputs.last_hidden_state
        pooled = pool_tokens(hidden_states, inputs.get("attention_mask"), self.config.pooling)
        further = {name: outputs.get(name) for name in ("hidden_states", "attentions")}
        return hidden_states, truncate(pooled, embedding_size), further | {"routing_record": record}

    def _scale(self) -> torch.Tensor:
        """Returns the factor of the similarities."""
        return at_most(self.logit_scale.float(), MAX_LOGIT_SCALE).exp()

    def _contrastive_loss(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: Any,
        is_document: Any,
    ) -> torch.Tensor:
        check(
            (getattr(self, "tp_size", None) or 1) == 1,
            "the contrastive loss does not support tensor parallelism, whose processes have the same rows: use another "
            "kind of parallelism (`fsdp_size`, `ep_size`) for training.",
        )
        return contrastive_loss(
            pool_tokens(hidden_states, attention_mask, self.config.pooling),
            labels,
            is_document.to(hidden_states.device, torch.bool),
            loss=self.config.contrastive_loss,
            scale=self._scale(),
            bias=None if self.logit_bias is None else self.logit_bias.float(),
            sizes=self.config.trained_sizes,
        )

    def _compare(self, embeddings: torch.Tensor, is_document: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Returns the embeddings of queries and documents and their scores, if the batch has both."""
        if is_document is None:
            return {}
        is_document = is_document.to(embeddings.device, torch.bool)
        if not (is_document.any() and not is_document.all()):
            return {}
        texts, images = embeddings[~is_document], embeddings[is_document]
        scores = self._scale() * (texts @ images.T)
        if self.logit_bias is not None:
            scores = scores + self.logit_bias.float()
        return {
            "logits_per_text": scores,
            "logits_per_image": scores.T,
            "text_embeds": texts,
            "image_embeds": images,
        }

    def _has_images(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns which rows `(B,)` contain placeholders."""
        placeholders = torch.tensor(self._placeholders(), device=input_ids.device)
        return torch.isin(input_ids, placeholders).any(dim=1)

    def _placeholders(self) -> list[int]:
        """Returns the ids of the placeholder tokens of all modalities."""
        return list(self.config.placeholder_ids.values())

    def _image_prompts(self, pixel_values: torch.Tensor) -> torch.Tensor:
        prompt = self.config.image_prompt_ids
        check(
            bool(prompt),
            "the number of tokens of an image depends on its size, so `pixel_values` are not enough: pass all inputs "
            "that `retrieval_inputs` from `modeling_sparse_moe_vlm.toolbox.retrieval` returns, `input_ids` included.",
        )
        device: Any = self.get_input_embeddings().weight.device
        return torch.tensor(prompt, device=device).repeat(len(pixel_values), 1)

    def _join(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Returns the token ids and mask of the texts and, below them, of the images, and the number of texts."""
        assert pixel_values is not None
        images = self._image_prompts(pixel_values)
        if input_ids is None:
            return images, torch.ones_like(images), 0
        check(
            position_ids is None,
            "`position_ids` cannot be combined with images that have no placeholders: leave it out.",
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        length = max(images.shape[1], input_ids.shape[1])
        filler = self.config.get_text_config().pad_token_id or 0
        ids = [nn.functional.pad(rows, (0, length - rows.shape[1]), value=filler) for rows in (input_ids, images)]
        masks = [
            nn.functional.pad(mask.long(), (0, length - mask.shape[1]))
            for mask in (attention_mask, torch.ones_like(images))
        ]
        return torch.cat(ids), torch.cat(masks), len(input_ids)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        Saves the model: see [`~transformers.PreTrainedModel.save_pretrained`]. The folder also gets the files that
        sentence-transformers reads.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save the model to.
            args (`Any`):
                Other arguments of [`~transformers.PreTrainedModel.save_pretrained`].
            kwargs (`Any`):
                Other keyword arguments of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        if kwargs.get("is_main_process", True):
            write_files(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _pair_up(num_texts: int, num_images: int) -> torch.Tensor:
    """Returns labels for texts and images in the same order."""
    check(
        num_texts == num_images,
        f"the batch has {num_texts} texts, but {num_images} images: pass as many of both, or `labels`.",
    )
    return -2 - torch.arange(num_texts).repeat(2)
