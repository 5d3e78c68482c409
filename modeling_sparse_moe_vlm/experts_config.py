"""Configuration of the experts: all that routers, experts and router losses know of the model that they are in.

A decoder's configuration can inherit from it, or a model of any kind can hold one as a sub-configuration.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from .checks import MAX_LAYERS, check_integer, check_spelling
from .expert_groups import BUILTIN_MODALITIES, ExpertGroup
from .experts_validation import check_expert_fields, resolve_expert_groups

# Completes the type of fields that may be left out, or given in another form: `__post_init__` replaces what was given.
Given = Any

_NUM_SHARDS = "_num_expert_shards"


class SparseMoeVlmExpertsConfig(PreTrainedConfig):
    r"""
    Configuration of the experts of a model: their arrangement, their routers and the router losses.

    Args:
        hidden_size (`int`, defaults to 2048):
            Width of the residual stream that experts read and write.
        num_hidden_layers (`int`, defaults to 24):
            Number of layers of the model, sparse and dense ones.
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the gated feed-forward networks (SwiGLU with `"silu"`).
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights.
        decoder_sparse_step (`int`, defaults to 1):
            Every how many layers one is sparse: layer `i` is if `(i + 1) % decoder_sparse_step == 0`.
        mlp_only_layers (`list[int]`, *optional*):
            Layers that stay dense whatever `decoder_sparse_step` says.
        modalities (`list[str]`, *optional*, defaults to `["text", "image"]`):
            Names of the token modalities; the position is the id in `mm_token_type_ids`. Those that Transformers
            knows have its numbers (0 text, 1 image, 2 video, 3 audio); others take any place after the images'.
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts of a sparse layer. With explicit `expert_groups` it is derived from them.
        num_experts_per_tok (`int`, defaults to 2):
            Number of routed experts that a token goes to (with `router="top_p"`, at most that many).
        num_experts_per_tok_by_modality (`dict[str, int]`, *optional*):
            Other numbers for some modalities, e.g. `{"image": 1}`.
        moe_intermediate_size (`int`, defaults to 1408):
            Width of one expert, where its group gives none.
        expert_groups (`str` or `list[dict]`, defaults to `"hybrid"`):
            The arrangement of experts, by name or as a list of groups (see [`ExpertGroup`] for the keys; `modalities`
            defaults to all, `intermediate_size` to `moe_intermediate_size`). By name:

            - `"hybrid"`: a joint pool of `num_experts` routed experts plus one always-on expert per modality; the best
              arm of MoIIE (arXiv 2508.09779, 13 benchmarks: hybrid 60.0, isolated 59.1, joint 59.1, dense 58.8).
            - `"joint"`: one pool of `num_experts` routed experts for every modality.
            - `"isolated"`: `num_experts` routed experts split evenly into one group per modality.
        expert_pool (`list[int]`, *optional*):
            Cross-layer expert pools: for every layer the number of the pool whose routed experts it uses, `None` (as
            in dense layers) for its own. Layers of one pool share the routed experts, each with a router of its own
            (UniPool, arXiv 2605.06665); always-on experts stay with their layers.
        router (`str`, defaults to `"softmax"`):
            How router logits become expert weights: `"softmax"`, `"sigmoid"` (DeepSeek-V3, arXiv 2412.19437) or
            `"top_p"` (the fewest experts whose probability reaches `router_top_p`; arXiv 2403.07652).
        router_top_p (`float`, defaults to 0.6):
            Probability that the chosen experts must reach together, for `router="top_p"`.
        norm_topk_prob (`bool`, defaults to `True`):
            Whether the weights of the chosen experts are scaled to sum to 1.
        output_router_logits (`bool`, defaults to `False`):
            Whether to return the router logits and, with labels or in training mode, their losses, which are added to
            the loss. A setting of training: [`~toolbox.training.SparseMoeTrainer`] saves models without it.
        router_aux_loss_coef (`float`, defaults to 0.001):
            Coefficient of the load-balancing loss (per modality, averaged over layers and modalities).
        router_z_loss_coef (`float`, defaults to 0.0):
            Coefficient of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5). It keeps logits small; it does not
            balance.
        router_local_entropy_coef (`float` or `dict[str, float]`, defaults to 0.0):
            Coefficient of LIMoE's local entropy loss (arXiv 2206.02770), which makes the router decide; for
            all modalities, or by modality (0 for those that are left out).
        router_global_entropy_coef (`float` or `dict[str, float]`, defaults to 0.0):
            Coefficient of LIMoE's global entropy loss, which makes the tokens of a modality differ; likewise.
        router_global_entropy_threshold (`float` or `dict[str, float]`, *optional*):
            τ of the global entropy loss, in nats: log(S) asks a modality to use at least about S experts. By default
            all the experts that serve it.
        router_bias_update_rate (`float`, *optional*):
            Loss-free balancing (DeepSeek-V3, arXiv 2412.19437, eq. 16; arXiv 2408.15664): routers have a bias per
            modality and expert for the choice of experts only, which moves by that much after every training step
            (the paper's rate is 1e-3). With 0 the bias is there and stays as it is; with `None` there is none.
        expert_capacity_factor (`float`, *optional*):
            Capacity of an expert, in multiples of its share in balanced routing; the least certain tokens beyond it
            are dropped (V-MoE's batch-priority routing, arXiv 2106.05974). With it the routing of a token
            depends on its batch. No limit when `None`.

    Raises:
        ValueError: If fields contradict each other; the message names the field and the fix.
    """

    model_type = "sparse_moe_vlm_experts"
    base_config_key = "experts_config"
    # Fields that `from_pretrained` takes as keyword arguments.
    fields_of_loading: ClassVar[frozenset[str]] = frozenset()

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | Given = None
    modalities: list[str] | Given = None
    num_experts: int | Given = None
    num_experts_per_tok: int = 2
    num_experts_per_tok_by_modality: dict[str, int] | None = None
    moe_intermediate_size: int = 1408
    expert_groups: list[dict[str, Any]] | Given = "hybrid"
    expert_pool: list[int | None] | None = None
    router: str = "softmax"
    router_top_p: float = 0.6
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    router_local_entropy_coef: float | dict[str, float] = 0.0
    router_global_entropy_coef: float | dict[str, float] = 0.0
    router_global_entropy_threshold: float | dict[str, float] | None = None
    router_bias_update_rate: float | None = None
    expert_capacity_factor: float | None = None

    def __post_init__(self, **kwargs):
        check_spelling(kwargs, {field.name for field in fields(type(self))})
        self._complete()
        super().__post_init__(**kwargs)

    def _complete(self) -> None:
        """Checks the fields and spells out those that were left out or given by name."""
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        if self.modalities is None:
            self.modalities = BUILTIN_MODALITIES[:2]
        check_expert_fields(self)
        self.mlp_only_layers = list(self.mlp_only_layers)
        self.modalities = list(self.modalities)
        resolve_expert_groups(self)

    def validate_architecture(self) -> None:
        """Checks the fields again, which may have been changed, when a model is made of them."""
        super().validate_architecture()
        check_expert_fields(self)
        resolve_expert_groups(self)

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has experts (else a dense feed-forward block)."""
        return layer_idx not in self.mlp_only_layers and (layer_idx + 1) % self.decoder_sparse_step == 0

    @property
    def sparse_layers(self) -> list[int]:
        """The layers that have experts, in order: router logits, biases and counts are listed by them."""
        check_integer("num_hidden_layers", self.num_hidden_layers, at_most=MAX_LAYERS)  # it may have been changed
        dense = set(self.mlp_only_layers)
        return [
            layer
            for layer in range(self.decoder_sparse_step - 1, self.num_hidden_layers, self.decoder_sparse_step)
            if layer not in dense
        ]

    def layer_expert_groups(self, layer_idx: int, always_on: bool | None = None) -> tuple[ExpertGroup, ...]:
        """
        The expert groups of one layer, in the order of the router's logits.

        Args:
            layer_idx (`int`):
                Index of the layer.
            always_on (`bool`, *optional*):
                Only the always-on groups (`True`) or only the routed ones (`False`).

        Returns:
            `tuple[ExpertGroup, ...]`: empty for a dense layer.
        """
        if not self.is_sparse_layer(layer_idx):
            return ()
        groups = (ExpertGroup.from_dict(group) for group in self.expert_groups)
        return tuple(
            group
            for group in groups
            if (group.layers is None or layer_idx in group.layers) and always_on in (None, group.always_on)
        )

    @property
    def pools(self) -> dict[int, list[int]]:
        """The layers of every expert pool, by the pool's number."""
        pools: dict[int, list[int]] = {}
        for layer, pool in enumerate(self.expert_pool or []):
            if pool is not None:
                pools.setdefault(pool, []).append(layer)
        return pools

    def layer_pool(self, layer_idx: int) -> int | None:
        """The pool whose routed experts layer `layer_idx` uses; `None` for its own."""
        return None if self.expert_pool is None else self.expert_pool[layer_idx]

    @property
    def layers_by_experts(self) -> list[list[int]]:
        """The sparse layers in order, those that share their routed experts together."""
        own = [[layer] for layer in self.sparse_layers if self.layer_pool(layer) is None]
        return sorted([*own, *self.pools.values()])

    @property
    def routed_group_names(self) -> list[str]:
        """Names of the routed groups of the whole model; with a single one, `mlp.experts` is that group itself."""
        return [group["name"] for group in self.expert_groups if not group["always_on"]]

    def experts_per_token(self, modality: str) -> int:
        """Number of routed experts per token of `modality`."""
        return (self.num_experts_per_tok_by_modality or {}).get(modality, self.num_experts_per_tok)

    @property
    def num_expert_shards(self) -> int:
        """
        Number of modules that the experts of a group are cut into, for device maps; a group has no more than it has
        experts. A choice of loading (`from_pretrained(…, num_expert_shards=4)`), which is not saved.
        """
        return self.__dict__.get(_NUM_SHARDS, 1)

    @num_expert_shards.setter
    def num_expert_shards(self, value: int) -> None:
        check_integer("num_expert_shards", value)
        self.__dict__[_NUM_SHARDS] = value

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop(_NUM_SHARDS, None)


def experts_config_of(config: PreTrainedConfig) -> Any:
    """
    The configuration of the experts of a model.

    Args:
        config (`PreTrainedConfig`):
            Configuration of a model, or of its decoder.

    Returns:
        `SparseMoeVlmExpertsConfig`: `config.experts_config`, where a model holds one as a sub-configuration; else the
        decoder's configuration, which inherits from it in models of this package (and has none of its fields in
        other models).
    """
    own = getattr(config, SparseMoeVlmExpertsConfig.base_config_key, None)
    return config.get_text_config() if own is None else own
