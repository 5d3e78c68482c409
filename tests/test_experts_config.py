"""The configuration of experts: any model can contain one, and the core uses no other configuration."""

import ast
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

import modeling_sparse_moe_vlm
from modeling_sparse_moe_vlm import SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.experts import SparseMoeVlmSparseMoeBlock, init_expert_weights
from modeling_sparse_moe_vlm.experts_config import SparseMoeVlmExpertsConfig
from modeling_sparse_moe_vlm.losses import router_losses
from modeling_sparse_moe_vlm.routing import RoutingPlanner
from modeling_sparse_moe_vlm.toolbox.routing import count_routing, routing_statistics
from tests.support.models import TEXT_CONFIG, make_model

PACKAGE = Path(modeling_sparse_moe_vlm.__file__).parent
CORE = [
    "capacity.py",
    "expert_groups.py",
    "expert_shards.py",
    "experts.py",
    "experts_config.py",
    "experts_validation.py",
    "losses.py",
    "routing.py",
    "toolbox/routing/counts.py",
    "toolbox/routing/router_bias.py",
    "toolbox/routing/statistics.py",
]
HOST = {"attention", "config_validation", "configuration_sparse_moe_vlm", "decoder_layer", "fusion", "language_head"}
HOST |= {"modality_encoder", "modeling_sparse_moe_vlm", "pretrained", "vision_tower"}
EXPERTS = {name: TEXT_CONFIG[name] for name in ("hidden_size", "num_hidden_layers", "initializer_range")}
EXPERTS |= {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def siblings(path: Path) -> set[Path]:
    """Returns our files that importing a file imports, directly or indirectly."""
    found: set[Path] = set()
    unread = [path]
    while unread:
        file = unread.pop()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = file.parents[node.level - 1].joinpath(*node.module.split("."))
                imported = (
                    imported.with_suffix(".py") if imported.with_suffix(".py").exists() else imported / "__init__.py"
                )
                unread += [imported] if imported not in found else []
                found.add(imported)
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_nothing_of_its_host(name):
    imported = {file.stem for file in siblings(PACKAGE / name)}
    assert not imported & HOST


def test_hosts_import_the_core():
    """Otherwise, the test above could not fail."""
    imported = {file.stem for file in siblings(PACKAGE / "modeling_sparse_moe_vlm.py")}
    assert {"attention", "configuration_sparse_moe_vlm", "decoder_layer", "experts_config", "routing"} <= imported


# ------------------------------------------------------------------------------------------------ as a sub-config


class HostConfig(PreTrainedConfig):
    model_type = "host_of_experts"
    sub_configs_defaults = {"experts_config": SubConfigSpec(config_class=SparseMoeVlmExpertsConfig)}
    hidden_size: int = 32
    initializer_range: float = 0.2
    experts_config: SparseMoeVlmExpertsConfig | dict | None = None


class Host(PreTrainedModel):
    """Feed-forward blocks of another model. It plans once per pass, and its layers are sparse blocks of the core."""

    config: HostConfig

    def __init__(self, config):
        super().__init__(config)
        experts = config.experts_config
        self.blocks = nn.ModuleList([SparseMoeVlmSparseMoeBlock(experts, layer) for layer in experts.sparse_layers])
        self.planner = RoutingPlanner(experts)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        init_expert_weights(module, std=self.config.experts_config.initializer_range)

    def forward(self, hidden_states, mm_token_type_ids):
        plan = self.planner(mm_token_type_ids, hidden_states.device)
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states, plan)
        return hidden_states


def test_a_host_round_trips_its_experts_configuration(tmp_path):
    config = HostConfig(experts_config=EXPERTS | {"expert_groups": "isolated", "router_z_loss_coef": 0.5})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["experts_config"]
    assert saved["model_type"] == "sparse_moe_vlm_experts"
    assert [group["name"] for group in saved["expert_groups"]] == ["text", "image"]
    again = HostConfig.from_pretrained(tmp_path)
    assert type(again.experts_config) is SparseMoeVlmExpertsConfig
    assert again.to_dict() == config.to_dict()
    assert again.experts_config.router_z_loss_coef == 0.5
    assert not hasattr(again.experts_config, "vocab_size")


@pytest.mark.parametrize("arrangement", ["hybrid", "joint", "isolated"])
def test_a_host_without_our_decoder_routes_as_the_decoder_does(arrangement):
    """With the same weights, a plain experts configuration gives the same output, losses and statistics."""
    settings = {"expert_groups": arrangement, "router_z_loss_coef": 0.5, "router_local_entropy_coef": 0.1}
    torch.manual_seed(0)
    host = Host(HostConfig(experts_config=EXPERTS | settings)).eval()
    ours = make_model(**settings)
    experts, decoder = host.config.experts_config, ours.config.text_config
    assert all(0.15 < weight.std() < 0.25 for weight in host.blocks.parameters())
    blocks = [layer.mlp for layer in ours.model.language_model.layers]
    for mine, its in zip(blocks, host.blocks, strict=True):
        mine.load_state_dict(its.state_dict())
    states, ids = torch.randn(2, 5, 32), torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    logits: dict[str, list] = {"ours": [], "its": []}
    for name, modules in (("ours", blocks), ("its", host.blocks)):
        for block in modules:
            block.gate.register_forward_hook(lambda _, __, output, name=name: logits[name].append(output[0]))
    expected = states
    plan = RoutingPlanner(decoder)(ids, states.device)
    for block in blocks:
        expected = expected + block(expected, plan)
    assert torch.equal(host(states, ids), expected)
    assert not torch.allclose(expected, states, atol=0.1)

    of_ours, of_host = router_losses(decoder, logits["ours"], ids), router_losses(experts, logits["its"], ids)
    for mine, its in zip(of_ours, of_host, strict=True):
        assert torch.equal(mine, its)
    assert of_host.total(experts) == of_ours.total(decoder) > 0
    statistics = routing_statistics(experts, count_routing(experts, logits["its"], ids))
    assert statistics.rows == routing_statistics(decoder, count_routing(decoder, logits["ours"], ids)).rows
    assert sum(row.num_tokens for row in statistics.rows) == 2 * 10


# ------------------------------------------------------------------------------------------------ as a decoder's base


def test_sparse_layers():
    layers = {"num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert SparseMoeVlmExpertsConfig(**layers).sparse_layers == [1, 5]
    assert SparseMoeVlmExpertsConfig(num_hidden_layers=2, mlp_only_layers=[0, 1]).sparse_layers == []


def test_the_decoders_file_is_as_flat_as_before(tmp_path):
    SparseMoeVlmTextConfig(**TEXT_CONFIG).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "sparse_moe_vlm_text"
    assert {"num_experts", "vocab_size", "hidden_size", "expert_groups", "router_aux_loss_coef"} <= set(saved)
    assert "experts_config" not in saved


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_expert": 4}, "no field `num_expert`"),
        ({"hidden_size": 0}, "`hidden_size`"),
        ({"num_experts_per_tok": 9}, "`num_experts_per_tok` is 9"),
        ({"router": "hash"}, "`router`"),
        ({"router_z_loss_coef": -1}, "`router_z_loss_coef`"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"modalities": ["image", "text"]}, "`modalities`"),
        ({"mlp_only_layers": [24]}, "`mlp_only_layers`"),
        ({"expert_pool": [0]}, "`expert_pool`"),
    ],
)
def test_experts_are_checked_without_a_decoder(wrong, message):
    with pytest.raises(Exception, match=message):
        SparseMoeVlmExpertsConfig(**wrong)


def test_fields_changed_later_are_checked_when_a_model_is_made():
    config = SparseMoeVlmExpertsConfig(**EXPERTS)
    config.num_experts_per_tok = 5
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        config.validate_architecture()
