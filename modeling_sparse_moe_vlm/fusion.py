"""A layer that fuses feature streams (visual, language and others), built from the same parts as the decoder.

Data flow with m visual and n language tokens::

    visual (B, m, d_v) ──► norm ──► projection ─┐
                                                ├─► router ──► experts of the modality ──► values E_v(V), E_l(L)
    language (B, n, d_l) ──► norm ──────────────┤
                                                └─► queries (language only) and keys ──► α, β

    Z = α·E_v(V) + β·E_l(L)      (B, n, d_l), with α + β = 1 for every head and language token

Every head averages each stream with its own attention weights. The averages are merged like the attention parts of the
decoder: see `distributed_attention.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .checks import check, check_distinct, check_integer
from .configuration_sparse_moe_vlm import SparseMoeVlmTextConfig
from .distributed_attention import attend_by_channels
from .expert_groups import BUILTIN_MODALITIES
from .experts import SparseMoeVlmExpertGroups, SparseMoeVlmExperts
from .losses import router_losses
from .normalization import SparseMoeVlmRMSNorm
from .routing import RoutingPlanner, SparseMoeVlmTopKRouter, groups_key
from .steering import initial_log_priors
from .token_modalities import TokenModalities


class SparseMoeFusionOutput(NamedTuple):
    """
    Output of [`SparseMoeFusion`] with `output_modality_weights=True`.

    Args:
        output (`torch.Tensor` of shape `(B, n, lang_dim)`):
            The fused stream Z, which the layer returns without `output_modality_weights`.
        modality_weights (`dict[str, torch.Tensor]`):
            Weight of each stream (`"language"`, `"visual"` and further streams) for every head and language token, of
            shape `(B, heads, n)`, in float32. The weights sum to 1. An empty stream has weight 0; if all streams of a
            row are empty, all weights are 0.
        aux_loss (`torch.Tensor`):
            Load balancing loss of the experts, a scalar. Add it to the training loss with a small factor, such as 0.01,
            so that the router does not send all tokens to the same expert.
    """

    output: torch.Tensor
    modality_weights: dict[str, torch.Tensor]
    aux_loss: torch.Tensor

    @property
    def alpha(self) -> torch.Tensor:
        """Weight α of the visual stream, of shape `(B, heads, n)`."""
        return self.modality_weights["visual"]

    @property
    def beta(self) -> torch.Tensor:
        """Weight β of the language stream, of shape `(B, heads, n)`."""
        return self.modality_weights["language"]


class SparseMoeFusion(nn.Module):
    """
    A layer that fuses a visual stream, a language stream and optional further streams into one stream with the shape of
    the language stream: `visual (B, m, visual_dim)`, `language (B, n, lang_dim)` → `(B, n, lang_dim)`.

    The experts are split evenly over the streams, and a router chooses among the experts of a token's stream. The
    language tokens then attend to all tokens. The attention to each stream is computed separately and merged with the
    weights α and β as in D-Attn (arXiv 2502.01906), with priors that every head learns. The layer adds no position
    embeddings (the streams must contain them) and has no residual connection: add the output to the language stream
    yourself if you need one.

    Args:
        num_experts (`int`):
            Number of experts, a multiple of the number of streams. With 2 experts and 2 streams, each stream has one
            expert.
        visual_dim (`int`):
            Width of the visual stream.
        lang_dim (`int`):
            Width of the language stream and of the output.
        alpha_init (`float`, *optional*, defaults to 0.5):
            Initial prior of the visual part and of the parts of further streams. Only the ratio of the priors matters.
        beta_init (`float`, *optional*, defaults to 0.5):
            Initial prior of the language part.
        num_heads (`int`, *optional*, defaults to 8):
            Number of attention heads. `lang_dim` must be a multiple of twice this number.
        num_experts_per_tok (`int`, *optional*, defaults to 1):
            Number of experts per token, weighted by their probabilities (Switch Transformer, arXiv 2101.03961).
        moe_intermediate_size (`int`, *optional*, defaults to `lang_dim`):
            Intermediate size of an expert.
        further_dims (`dict[str, int]`, *optional*):
            Widths of further streams, by name.

    Raises:
        ValueError: If the arguments contradict each other. The message names the argument and what is expected.

    ```python
    >>> import torch
    >>> from modeling_sparse_moe_vlm import SparseMoeFusion

    >>> fusion = SparseMoeFusion(num_experts=2, visual_dim=512, lang_dim=768)
    >>> visual, language = torch.randn(1, 50, 512), torch.randn(1, 100, 768)
    >>> fusion(visual, language).shape
    torch.Size([1, 100, 768])

    >>> fused = fusion(visual, language, output_modality_weights=True)
    >>> fused.alpha.shape
    torch.Size([1, 8, 100])
    >>> torch.allclose(fused.alpha + fused.beta, torch.ones(1, 8, 100))
    True

    >>> fusion = SparseMoeFusion(num_experts=6, visual_dim=512, lang_dim=768, further_dims={"audio": 128})
    >>> further = {"audio": torch.randn(1, 30, 128)}
    >>> fused = fusion(visual, language, further=further, output_modality_weights=True)
    >>> list(fused.modality_weights)
    ['language', 'visual', 'audio']

    ```
    """

    def __init__(
        self,
        num_experts: int,
        visual_dim: int,
        lang_dim: int,
        alpha_init: float = 0.5,
        beta_init: float = 0.5,
        *,
        num_heads: int = 8,
        num_experts_per_tok: int = 1,
        moe_intermediate_size: int | None = None,
        further_dims: Mapping[str, int] | None = None,
    ):
        super().__init__()
        further_dims = dict(further_dims or {})
        check_distinct("further_dims", ["language", "visual", *further_dims])
        # In the order of the modality ids. Language comes first, like text in the decoder.
        self.dims = {"language": lang_dim, "visual": visual_dim, **further_dims}
        names = list(self.dims)
        if moe_intermediate_size is None:
            moe_intermediate_size = lang_dim
        for field, value in {
            "num_experts": num_experts,
            "visual_dim": visual_dim,
            "lang_dim": lang_dim,
            "num_heads": num_heads,
            "num_experts_per_tok": num_experts_per_tok,
            "moe_intermediate_size": moe_intermediate_size,
            **{f"further_dims[{name!r}]": width for name, width in further_dims.items()},
        }.items():
            check_integer(field, value)
        check(
            num_experts % len(names) == 0,
            f"`num_experts` must be a multiple of {len(names)}, to be split evenly over the streams {names}, got "
            f"{num_experts}.",
        )
        experts_per_stream = num_experts // len(names)
        check(
            num_experts_per_tok <= experts_per_stream,
            f"`num_experts_per_tok` must be at most {experts_per_stream}, the number of experts per stream, got "
            f"{num_experts_per_tok}.",
        )
        check(
            lang_dim % (2 * num_heads) == 0,
            f"`lang_dim` must be a multiple of twice `num_heads`, {2 * num_heads}, got {lang_dim}.",
        )
        # The kernels of grouped matrix products need rows of a multiple of 16 bytes, also in bfloat16.
        is_aligned = lang_dim % 8 == 0 and moe_intermediate_size % 8 == 0
        self.head_dim = lang_dim // num_heads
        # Only the ids matter here, but the configuration requires these names for the first modalities.
        modalities = [*BUILTIN_MODALITIES, *(f"{name}_stream" for name in names[len(BUILTIN_MODALITIES) :])]
        modalities = modalities[: len(names)]
        # The configuration that the router, the experts and the attention read.
        self.config = SparseMoeVlmTextConfig(
            hidden_size=lang_dim,
            num_hidden_layers=1,
            num_attention_heads=num_heads,
            modalities=modalities,
            alpha_init=alpha_init,
            beta_init=beta_init,
            learned_modality_priors=True,
            expert_groups=[
                {"name": name, "num_experts": experts_per_stream, "modalities": [modality]}
                for name, modality in zip(names, modalities, strict=True)
            ],
            moe_intermediate_size=moe_intermediate_size,
            num_experts_per_tok=num_experts_per_tok,
            # The router learns from the weights of the experts, even with only one expert per token.
            norm_topk_prob=False,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm" if is_aligned else "batched_mm",
        )
        groups = self.config.layer_expert_groups(0)

        eps = self.config.rms_norm_eps
        self.norms = nn.ModuleDict({name: SparseMoeVlmRMSNorm(width, eps=eps) for name, width in self.dims.items()})
        # The language stream does not need a projection, because the experts have its width.
        self.projections = nn.ModuleDict(
            {name: nn.Linear(self.dims[name], lang_dim, bias=False) for name in names if name != "language"}
        )
        self.gate = SparseMoeVlmTopKRouter(self.config, groups)
        self.experts = SparseMoeVlmExpertGroups(self.config, groups)
        # There are no value and output projections: the outputs of the experts are the values.
        self.q_proj = nn.Linear(lang_dim, lang_dim, bias=False)
        self.k_proj = nn.Linear(lang_dim, lang_dim, bias=False)
        self.q_norm = SparseMoeVlmRMSNorm(self.head_dim, eps=eps)
        self.k_norm = SparseMoeVlmRMSNorm(self.head_dim, eps=eps)
        self.modality_log_priors = nn.Parameter(torch.empty(num_heads, len(names)))  # log π by head and stream
        # Attributes that the attention functions read.
        self.is_causal = False
        self.num_key_value_groups = 1
        self._planner = RoutingPlanner(self.config)
        self._groups_key = groups_key(groups)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the weights randomly, so that they preserve the scale of their inputs, and resets the priors."""
        for module in self.modules():
            if isinstance(module, SparseMoeVlmRMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | SparseMoeVlmTopKRouter | SparseMoeVlmExperts):
                for weight in module.parameters(recurse=False):
                    nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        self.modality_log_priors.copy_(self.modality_log_priors.new_tensor(initial_log_priors(self.config)))

    def forward(
        self,
        visual: torch.Tensor | None,
        language: torch.Tensor,
        visual_mask: torch.Tensor | None = None,
        language_mask: torch.Tensor | None = None,
        *,
        further: Mapping[str, torch.Tensor] | None = None,
        further_masks: Mapping[str, torch.Tensor] | None = None,
        output_modality_weights: bool = False,
    ) -> torch.Tensor | SparseMoeFusionOutput:
        """
        Fuses the streams.

        Args:
            visual (`torch.Tensor` of shape `(B, m, visual_dim)`, *optional*):
                Visual stream. `None` is an empty stream (m = 0).
            language (`torch.Tensor` of shape `(B, n, lang_dim)`):
                Language stream, whose tokens are the queries.
            visual_mask (`torch.Tensor` of shape `(B, m)`, *optional*):
                1 or `True` for tokens, 0 or `False` for padding.
            language_mask (`torch.Tensor` of shape `(B, n)`, *optional*):
                1 or `True` for tokens, 0 or `False` for padding. Ignore the output at padding positions.
            further (`dict[str, torch.Tensor]`, *optional*):
                Further streams of shape `(B, tokens, width)`, by name. Streams that are left out are empty.
            further_masks (`dict[str, torch.Tensor]`, *optional*):
                Masks of the further streams, of shape `(B, tokens)`, by name.
            output_modality_weights (`bool`, *optional*, defaults to `False`):
                Whether to also return the weights of the streams and the load balancing loss.

        Returns:
            `torch.Tensor` of shape `(B, n, lang_dim)`, or [`SparseMoeFusionOutput`]: The fused stream, or with
            `output_modality_weights=True` the output with all fields.

        Raises:
            ValueError: If a stream or mask has the wrong shape or type, if a name is unknown, or if the language stream
                is empty.
        """
        further, further_masks = further or {}, further_masks or {}
        for field, given in (("further", further), ("further_masks", further_masks)):
            known = list(self.dims)[2:]
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"`{field}` has unknown streams {unknown}: the further streams are {known}.")
        streams, masks = self._complete(
            {"language": language, "visual": visual, **further},
            {"language": language_mask, "visual": visual_mask, **further_masks},
        )

        # Language comes last, because flash attention uses the end of the mask for the queries.
        embedded = {name: self._embed(name, stream) for name, stream in reversed(streams.items())}
        tokens = torch.cat(list(embedded.values()), dim=1)  # (B, S, d_l)
        visible = torch.cat([masks[name] for name in embedded], dim=1)
        id_of = {name: modality_id for modality_id, name in enumerate(self.dims)}
        ids = torch.cat([torch.full_like(masks[name], id_of[name], dtype=torch.long) for name in embedded], dim=1)

        router_logits, chosen, values = self._apply_experts(tokens, ids)
        query = self.q_norm(self._split_heads(self.q_proj(embedded["language"])))
        key = self.k_norm(self._split_heads(self.k_proj(tokens)))
        merged = attend_by_channels(
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward),
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            self._split_heads(values).transpose(1, 2),
            # In rows without visible tokens, all tokens are made visible to avoid NaN. Their output is set to 0 below.
            create_bidirectional_mask(
                self.config,
                embedded["language"],
                visible | ~visible.any(dim=1, keepdim=True),
                encoder_hidden_states=tokens,
            ),
            ids,
            len(self.dims),
            log_priors=self.modality_log_priors,
            scaling=self.head_dim**-0.5,
        )
        is_there = torch.stack([masks[name].any(dim=1) for name in self.dims], dim=1)  # (B, M)
        assert merged.weights is not None
        output = merged.output.flatten(2).masked_fill(~is_there.any(dim=1)[:, None, None], 0.0)
        if not output_modality_weights:
            return output
        weights = merged.weights.masked_fill(~is_there[:, None, None], 0.0)
        return SparseMoeFusionOutput(
            output=output,
            modality_weights=dict(zip(self.dims, weights.unbind(dim=-1), strict=True)),
            aux_loss=router_losses(self.config, [router_logits], ids, visible, router_indices=[chosen]).aux_loss,
        )

    def _embed(self, name: str, stream: torch.Tensor) -> torch.Tensor:
        """Normalises and projects a stream: `(B, tokens, width)` → `(B, tokens, d_l)`."""
        stream = self.norms[name](stream)
        return self.projections[name](stream) if name in self.projections else stream

    def _apply_experts(
        self, tokens: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the router logits `(B·S, E)`, the chosen experts `(B·S, k)` and their output `(B, S, d_l)`."""
        plan = self._planner.plan(TokenModalities(ids, None), tokens.device)
        assert plan is not None  # the experts of a token depend on its modality
        rows = tokens.flatten(0, 1)
        router_logits, top_k_weights, top_k_index = self.gate(rows, plan.served[self._groups_key])
        return router_logits, top_k_index, self.experts(rows, top_k_index, top_k_weights, plan.tokens).view_as(tokens)

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (-1, self.head_dim))

    def _complete(
        self, streams: dict[str, torch.Tensor | None], masks: dict[str, torch.Tensor | None]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        Checks the streams and masks, and returns all streams with their masks of type bool. Streams that were left out
        are empty, and masks that were left out hide nothing.
        """
        language = streams["language"]
        assert language is not None
        _check_shape("language", language, ("batch_size", "tokens", self.dims["language"]))
        batch_size, length = language.shape[:2]
        if length == 0:
            raise ValueError(
                "`language` must have at least one token, because its tokens are the queries, got "
                f"{tuple(language.shape)}."
            )
        all_streams, all_masks = {}, {}
        for name, width in self.dims.items():
            field, mask_field = name, f"{name}_mask"
            if name not in ("language", "visual"):
                field, mask_field = f"further[{name!r}]", f"further_masks[{name!r}]"
            stream, mask = streams.get(name), masks.get(name)
            if stream is None:
                stream = language.new_empty(batch_size, 0, width)
            _check_shape(field, stream, (batch_size, "tokens", width))
            if mask is None:
                mask = torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
            _check_shape(mask_field, mask, stream.shape[:2])
            if mask.is_floating_point():
                raise ValueError(f"`{mask_field}` must be of type bool or int, with 1 for tokens, got {mask.dtype}.")
            all_streams[name], all_masks[name] = stream, mask.to(stream.device, torch.bool)
        return all_streams, all_masks


def _check_shape(field: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raises `ValueError` unless the tensor has the expected shape. Sizes given by name can have any value."""
    fits = [isinstance(size, str) or size == own for size, own in zip(expected, tensor.shape)]
    if tensor.dim() != len(expected) or not all(fits):
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"`{field}` must have the shape ({sizes}), got {tuple(tensor.shape)}.")
