"""Configuration of the experts: all fields that the routers, the experts and the router losses need.

The configuration of a decoder can inherit from it, or a configuration of any model can contain it as a
sub-configuration.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from .checks import MAX_LAYERS, build_config, check_integer, check_spelling
from .expert_groups import BUILTIN_MODALITIES, ExpertGroup
from .experts_validation import check_expert_fields, resolve_expert_groups

# Added to the type of fields that accept other forms than the declared type. `__post_init__` converts their values.
Given = Any

_NUM_SHARDS = "_num_expert_shards"

# Fields of `start` that name a model from which this model was made: a name on the Hub or a folder.
_PARENTS = ("base_model", "vision_encoder")
_NAME_ON_HUB = re.compile(r"(?![.-])[\w.-]+(/[\w.-]+)?", re.ASCII)
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


class PushedWithoutPaths:
    """Base class of configurations, which are uploaded to the Hub without paths of this machine."""

    def push_to_hub(self, *args, **kwargs):
        """
        Uploads the configuration: see [`~transformers.utils.PushToHubMixin.push_to_hub`]. See
        [`without_local_parents`].
        """
        with without_local_parents(self):
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def without_local_parents(config: Any) -> Iterator[None]:
    """
    Context manager in which the record of how the experts started does not name folders of this machine. A folder in
    the cache of the Hub is replaced with the name on the Hub, and other folders are left out.

    Args:
        config (`PreTrainedConfig`):
            Configuration of a model. It is restored afterwards.
    """
    experts = experts_config_of(config)
    start = getattr(experts, "start", None)
    if not isinstance(start, dict):
        yield
        return
    experts.start = {}
    for name, value in start.items():
        published = _name_on_hub(value) if name in _PARENTS else value
        if published is not None:
            experts.start[name] = published
    try:
        yield
    finally:
        experts.start = start


def _name_on_hub(name: str) -> str | None:
    in_cache = _IN_CACHE.search(name.replace("\\", "/"))
    if in_cache is not None:
        return f"{in_cache[1]}/{in_cache[2]}"
    return name if _NAME_ON_HUB.fullmatch(name) and not os.path.exists(name) else None


class SparseMoeVlmExpertsConfig(PushedWithoutPaths, PreTrainedConfig):
    r"""
    Configuration of the experts of a model: the expert groups, the routers and the router losses.

    Args:
        hidden_size (`int`, defaults to 2048):
            Width of the hidden states that the experts read and write.
        num_hidden_layers (`int`, defaults to 24):
            Number of layers of the model, both sparse and dense.
        hidden_act (`str`, defaults to `"silu"`):
            Activation function of the gated feed-forward networks (SwiGLU with `"silu"`).
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights.
        decoder_sparse_step (`int`, defaults to 1):
            Frequency of the sparse layers: layer `i` is sparse if `(i + 1) % decoder_sparse_step == 0`.
        mlp_only_layers (`list[int]`, *optional*):
            Layers that are dense regardless of `decoder_sparse_step`.
        modalities (`list[str]`, *optional*, defaults to `["text", "image"]`):
            Names of the token modalities. The position of a modality is its id in `mm_token_type_ids`. Modalities
            known to Transformers must have its ids (0 text, 1 image, 2 video, 3 audio). Other modalities can have any
            other position.
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts of a sparse layer. If `expert_groups` is a list, it is derived from the groups.
        num_experts_per_tok (`int`, defaults to 2):
            Number of routed experts per token. With `router="top_p"`, it is the maximum number.
        num_experts_per_tok_by_modality (`dict[str, int]`, *optional*):
            Number of routed experts per token for modalities that need a different one, such as `{"image": 1}`.
        moe_intermediate_size (`int`, defaults to 1408):
            Intermediate size of an expert, for groups without their own `intermediate_size`.
        expert_groups (`str` or `list[dict]`, defaults to `"hybrid"`):
            The arrangement of the experts, as a name or a list of groups. A group is a dict with the keys of
            [`ExpertGroup`], of which `name` and `num_experts` are required. The available names are:

            - `"hybrid"`: one group of `num_experts` routed experts for all modalities and one always-on expert per
              modality. It is the best arrangement in MoIIE (arXiv 2508.09779; mean of 13 benchmarks: hybrid 60.0,
              isolated 59.1, joint 59.1, dense 58.8).
            - `"joint"`: one group of `num_experts` routed experts for all modalities.
            - `"isolated"`: `num_experts` routed experts, split evenly into one group per modality.
        expert_pool (`list[int]`, *optional*):
            Expert pools shared across layers: for every layer, the number of the pool whose routed experts it uses, or
            `None` if the layer has its own experts or is dense. The layers of a pool share the routed experts, but each
            has its own router (UniPool, arXiv 2605.06665). Always-on experts are not shared.
        router (`str`, defaults to `"softmax"`):
            How the router chooses and weights experts: `"softmax"`, `"sigmoid"` (DeepSeek-V3, arXiv 2412.19437) or
            `"top_p"` (the fewest experts whose total probability reaches `router_top_p`; arXiv 2403.07652).
        router_top_p (`float`, defaults to 0.6):
            Total probability that the chosen experts must reach with `router="top_p"`.
        norm_topk_prob (`bool`, defaults to `True`):
            Whether to normalise the weights of the chosen experts so that they sum to 1.
        output_router_logits (`bool`, defaults to `False`):
            Whether to return the router logits and, with labels or in training mode, to compute the router losses,
            which are added to the loss. [`~toolbox.training.SparseMoeTrainer`] resets this field when it saves a model,
            because it is a training setting.
        router_aux_loss_coef (`float`, defaults to 0.001):
            Coefficient of the load balancing loss, which is computed per modality and averaged over layers and
            modalities.
        router_z_loss_coef (`float`, defaults to 0.0):
            Coefficient of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), which keeps the router logits small. It
            does not balance the load.
        router_local_entropy_coef (`float` or `dict[str, float]`, defaults to 0.0):
            Coefficient of the local entropy loss of LIMoE (arXiv 2206.02770), which makes the router more confident
            about each token. A single value applies to all modalities; in a dict, modalities that are left out have
            the coefficient 0.
        router_global_entropy_coef (`float` or `dict[str, float]`, defaults to 0.0):
            Coefficient of the global entropy loss of LIMoE, which spreads the tokens of a modality over more experts.
            Accepts the same values as `router_local_entropy_coef`.
        router_global_entropy_threshold (`float` or `dict[str, float]`, *optional*):
            Threshold τ of the global entropy loss, in nats: log(S) makes a modality use at least about S experts. By
            default, S is the number of routed experts that serve the modality.
        router_bias_update_rate (`float`, *optional*):
            Update rate of the router biases for loss-free balancing (DeepSeek-V3, arXiv 2412.19437, eq. 16; arXiv
            2408.15664). The routers have one bias per modality and expert, which affects only the choice of experts.
            After every training step, each bias changes by this amount (1e-3 in the paper). With 0, the biases exist
            but do not change. With `None`, the routers have no biases.
        expert_capacity_factor (`float`, *optional*):
            Capacity of an expert as a multiple of its load in balanced routing. Tokens beyond the capacity are dropped,
            the least confident ones first (batch priority routing of V-MoE, arXiv 2106.05974). With a capacity, the
            routing of a token depends on the other tokens of the batch. With `None`, the capacity is unlimited.
        unfused_experts (`bool`, defaults to `False`):
            Whether the routed experts are separate linear layers instead of stacked parameters. Quantisers and adapters
            that only know linear layers then find them; without quantisation, they are slower. It does not affect the
            format of checkpoints, so it can be changed when a model is loaded.

    Raises:
        ValueError: If a field is invalid or fields contradict each other. The message names the field and the fix.
    """

    model_type = "sparse_moe_vlm_experts"
    base_config_key = "experts_config"
    # Fields that `from_pretrained` accepts as keyword arguments.
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
    unfused_experts: bool = False

    def __post_init__(self, **kwargs):
        check_spelling(kwargs, {field.name for field in fields(type(self))})
        self._complete()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Creates a configuration from a dict: see [`~transformers.PreTrainedConfig.from_dict`].

        Args:
            config_dict (`dict[str, Any]`):
                The fields of the configuration.
            kwargs (`Any`):
                Fields that override those of the dict.

        Returns:
            `SparseMoeVlmExpertsConfig`: The configuration.

        Raises:
            ValueError: If a field is invalid. The message names the field.
        """
        return build_config(partial(super().from_dict, **kwargs), config_dict)

    def _complete(self) -> None:
        """Checks the fields and fills in the values of fields that were left out or given by name."""
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        if self.modalities is None:
            self.modalities = BUILTIN_MODALITIES[:2]
        check_expert_fields(self)
        self.mlp_only_layers = list(self.mlp_only_layers)
        self.modalities = list(self.modalities)
        resolve_expert_groups(self)

    def validate_architecture(self) -> None:
        """
        Checks the fields again when a model is created, because they may have been changed.

        Raises:
            ValueError: If a field is invalid or fields contradict each other.
        """
        super().validate_architecture()
        check_expert_fields(self)
        resolve_expert_groups(self)

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Returns whether layer `layer_idx` is sparse, that is, has experts instead of a dense feed-forward block."""
        return layer_idx not in self.mlp_only_layers and (layer_idx + 1) % self.decoder_sparse_step == 0

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers that have experts. Router logits, biases and counts are listed in this order."""
        check_integer("num_hidden_layers", self.num_hidden_layers, at_most=MAX_LAYERS)  # may have been changed
        dense = set(self.mlp_only_layers)
        return [
            layer
            for layer in range(self.decoder_sparse_step - 1, self.num_hidden_layers, self.decoder_sparse_step)
            if layer not in dense
        ]

    def layer_expert_groups(self, layer_idx: int, always_on: bool | None = None) -> tuple[ExpertGroup, ...]:
        """
        Returns the expert groups of a layer, in the order of the router logits.

        Args:
            layer_idx (`int`):
                Index of the layer.
            always_on (`bool`, *optional*):
                Whether to return only the always-on groups (`True`) or only the routed groups (`False`). By default,
                all groups are returned.

        Returns:
            `tuple[ExpertGroup, ...]`: The groups; empty for a dense layer.
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
        """Indices of the layers of each expert pool, by the number of the pool."""
        pools: dict[int, list[int]] = {}
        for layer, pool in enumerate(self.expert_pool or []):
            if pool is not None:
                pools.setdefault(pool, []).append(layer)
        return pools

    def layer_pool(self, layer_idx: int) -> int | None:
        """Returns the number of the expert pool that layer `layer_idx` uses, or `None` if it does not use a pool."""
        return None if self.expert_pool is None else self.expert_pool[layer_idx]

    @property
    def layers_by_experts(self) -> list[list[int]]:
        """The sparse layers in order, grouped by the routed experts that they share."""
        own = [[layer] for layer in self.sparse_layers if self.layer_pool(layer) is None]
        return sorted([*own, *self.pools.values()])

    @property
    def routed_group_names(self) -> list[str]:
        """Names of the routed groups of the model. If there is only one, the module `mlp.experts` is that group."""
        return [group["name"] for group in self.expert_groups if not group["always_on"]]

    def experts_per_token(self, modality: str) -> int:
        """Returns the number of routed experts per token of `modality`."""
        return (self.num_experts_per_tok_by_modality or {}).get(modality, self.num_experts_per_tok)

    @property
    def num_expert_shards(self) -> int:
        """
        Number of modules that the experts of each group are split into, so that a device map can place them on several
        devices. A group has at most as many shards as experts. The number is set when a model is loaded
        (`from_pretrained(…, num_expert_shards=4)`) and is not saved.
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
    Returns the configuration of a model's experts.

    Args:
        config (`PreTrainedConfig`):
            Configuration of a model or of its decoder.

    Returns:
        `SparseMoeVlmExpertsConfig`: `config.experts_config`, if the configuration has this sub-configuration.
        Otherwise, the configuration of the decoder. In models of this package, it inherits from
        [`SparseMoeVlmExpertsConfig`]; in other models, it has none of these fields.
    """
    own = getattr(config, SparseMoeVlmExpertsConfig.base_config_key, None)
    return config.get_text_config() if own is None else own
