"""Fusion of given feature streams, visual, language and more, from the same parts as the decoder.

Data flow, with m visual and n language tokens::

    visual (B, m, d_v) ──► norm ──► projection ─┐
                                                ├─► router ──► experts of the modality ──► values E_v(V), E_l(L)
    language (B, n, d_l) ──► norm ──────────────┤
                                                └─► queries (language alone) and keys ──► α, β

    Z = α·E_v(V) + β·E_l(L)      (B, n, d_l), for every head and language token α + β = 1

A head averages each stream with its own attention weights, and the averages are merged as attention parts are: see
`distributed_attention.py`.
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
    What [`SparseMoeFusion`] returns with `output_modality_weights=True`.

    Args:
        output (`torch.Tensor` of shape `(B, n, d_l)`):
            Z, what the layer returns by itself otherwise.
        modality_weights (`dict[str, torch.Tensor]`):
            By stream, `"language"`, `"visual"` and further ones, its weight `(B, heads, n)` for every head and language
            token, in float32. They sum to 1. A stream that is empty has weight 0; where all are, so do all.
        aux_loss (`torch.Tensor`):
            Load-balancing loss of the experts, a scalar, to be added to the loss with a small factor, such as 0.01: it
            keeps a router from sending every token to the same expert.
    """

    output: torch.Tensor
    modality_weights: dict[str, torch.Tensor]
    aux_loss: torch.Tensor

    @property
    def alpha(self) -> torch.Tensor:
        """α, the weight of the visual stream, `(B, heads, n)`."""
        return self.modality_weights["visual"]

    @property
    def beta(self) -> torch.Tensor:
        """β, the weight of the language stream, `(B, heads, n)`."""
        return self.modality_weights["language"]


class SparseMoeFusion(nn.Module):
    """
    Fuses a visual and a language stream, and any further ones, into the language stream's shape:
    `visual (B, m, visual_dim)`, `language (B, n, lang_dim)` → `(B, n, lang_dim)`.

    The experts are split evenly over the streams, and a router picks for every token among those of its stream. The
    language tokens then attend to all tokens, in parts that are merged with α and β as in D-Attn (arXiv 2502.01906),
    with priors that every head learns. There are no positions (the streams bring theirs) and no residual connection:
    add the output to the language stream where you keep one.

    Args:
        num_experts (`int`):
            Number of experts, a multiple of the number of streams: 2 are one for each of two streams.
        visual_dim (`int`):
            Width of the visual stream.
        lang_dim (`int`):
            Width of the language stream and of the output.
        alpha_init (`float`, defaults to 0.5):
            Prior of the visual part, and of every further one, that the heads start from. Only the ratio of the priors
            counts.
        beta_init (`float`, defaults to 0.5):
            Prior of the language part.
        num_heads (`int`, defaults to 8):
            Number of attention heads; `lang_dim` is a multiple of twice that.
        num_experts_per_tok (`int`, defaults to 1):
            Number of experts per token, weighted by their probability (Switch Transformer, arXiv 2101.03961).
        moe_intermediate_size (`int`, *optional*, defaults to `lang_dim`):
            Width of an expert.
        further_dims (`dict[str, int]`, *optional*):
            Names and widths of further streams.

    Raises:
        ValueError: If the arguments do not fit together, or a stream or mask has the wrong shape; the message names
            what is expected.

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
        # In the order of the modality ids, in which language comes first, as text does in the decoder.
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
        # The kernels of grouped products want rows of whole 16 bytes, in bfloat16 too.
        is_aligned = lang_dim % 8 == 0 and moe_intermediate_size % 8 == 0
        self.head_dim = lang_dim // num_heads
        # Ids are what counts here, but the configuration prescribes the names of the first modalities.
        modalities = [*BUILTIN_MODALITIES, *(f"{name}_stream" for name in names[len(BUILTIN_MODALITIES) :])]
        modalities = modalities[: len(names)]
        # The configuration that the parts ask for.
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
            # The router learns from the weight of an expert, also where it picks only one.
            norm_topk_prob=False,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm" if is_aligned else "batched_mm",
        )
        groups = self.config.layer_expert_groups(0)

        eps = self.config.rms_norm_eps
        self.norms = nn.ModuleDict({name: SparseMoeVlmRMSNorm(width, eps=eps) for name, width in self.dims.items()})
        # The language stream has the width that experts work at.
        self.projections = nn.ModuleDict(
            {name: nn.Linear(self.dims[name], lang_dim, bias=False) for name in names if name != "language"}
        )
        self.gate = SparseMoeVlmTopKRouter(self.config, groups)
        self.experts = SparseMoeVlmExpertGroups(self.config, groups)
        # No projections of values and output: the experts map to what is averaged.
        self.q_proj = nn.Linear(lang_dim, lang_dim, bias=False)
        self.k_proj = nn.Linear(lang_dim, lang_dim, bias=False)
        self.q_norm = SparseMoeVlmRMSNorm(self.head_dim, eps=eps)
        self.k_norm = SparseMoeVlmRMSNorm(self.head_dim, eps=eps)
        self.modality_log_priors = nn.Parameter(torch.empty(num_heads, len(names)))  # log π by head and stream
        # What attention functions ask for.
        self.is_causal = False
        self.num_key_value_groups = 1
        self._planner = RoutingPlanner(self.config)
        self._groups_key = groups_key(groups)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the weights: at random, keeping the scale of what they multiply, and the priors as given."""
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
        Args:
            visual (`torch.Tensor` of shape `(B, m, visual_dim)`, *optional*):
                Visual stream; `None` counts as empty (m = 0).
            language (`torch.Tensor` of shape `(B, n, lang_dim)`):
                Language stream, whose tokens are the queries.
            visual_mask (`torch.Tensor` of shape `(B, m)`, *optional*):
                1 or `True` for a token, 0 or `False` for padding.
            language_mask (`torch.Tensor` of shape `(B, n)`, *optional*):
                Likewise. The output at padding means nothing.
            further (`dict[str, torch.Tensor]`, *optional*):
                Further streams by name, `(B, tokens, width)` each; one that is left out counts as empty.
            further_masks (`dict[str, torch.Tensor]`, *optional*):
                Their masks, `(B, tokens)` each.
            output_modality_weights (`bool`, defaults to `False`):
                Whether to return the weights and the load-balancing loss, too.

        Returns:
            `torch.Tensor` of shape `(B, n, lang_dim)`, or [`SparseMoeFusionOutput`] with `output_modality_weights`.
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

        # Language comes last: flash attention takes the end of the mask for that of the queries.
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
            # A query that sees nothing sees everything, lest it be not a number; it counts for nothing below.
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
        """`(B, tokens, width)` → `(B, tokens, d_l)`"""
        stream = self.norms[name](stream)
        return self.projections[name](stream) if name in self.projections else stream

    def _apply_experts(
        self, tokens: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits `(B·S, E)`, the chosen experts `(B·S, k)` and what they make of the tokens, `(B, S, d_l)`."""
        plan = self._planner.plan(TokenModalities(ids, None), tokens.device)
        assert plan is not None  # experts depend on the modality
        rows = tokens.flatten(0, 1)
        router_logits, top_k_weights, top_k_index = self.gate(rows, plan.served[self._groups_key])
        return router_logits, top_k_index, self.experts(rows, top_k_index, top_k_weights, plan.tokens).view_as(tokens)

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (-1, self.head_dim))

    def _complete(
        self, streams: dict[str, torch.Tensor | None], masks: dict[str, torch.Tensor | None]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Every stream and its mask of type bool, checked. What is left out is empty, and hides nothing."""
        language = streams["language"]
        assert language is not None
        _check_shape("language", language, ("batch_size", "tokens", self.dims["language"]))
        batch_size, length = language.shape[:2]
        if length == 0:
            raise ValueError(f"`language` must have at least one token, the queries, got {tuple(language.shape)}.")
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
                raise ValueError(f"`{mask_field}` must be of type bool or int, 1 for a token, got {mask.dtype}.")
            all_streams[name], all_masks[name] = stream, mask.to(stream.device, torch.bool)
        return all_streams, all_masks


def _check_shape(field: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raises `ValueError` unless the tensor has the expected sizes; a size that is a name may be any."""
    fits = [isinstance(size, str) or size == own for size, own in zip(expected, tensor.shape)]
    if tensor.dim() != len(expected) or not all(fits):
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"`{field}` must have the shape ({sizes}), got {tuple(tensor.shape)}.")
