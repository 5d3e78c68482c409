"""A model of another architecture that contains our sparse blocks, with entirely different names."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutput

from modeling_sparse_moe_vlm.experts import SparseMoeVlmSparseMoeBlock, make_experts
from modeling_sparse_moe_vlm.experts_config import SparseMoeVlmExpertsConfig
from modeling_sparse_moe_vlm.experts_host import ExpertsHost
from modeling_sparse_moe_vlm.routing import RoutingPlanner
from modeling_sparse_moe_vlm.token_modalities import TokenModalities
from tests.support.models import IMAGE_TOKEN_ID

WIDTH, VOCABULARY = 32, 99


class OtherConfig(PreTrainedConfig):
    model_type = "other_host_of_experts"
    sub_configs_defaults = {"experts_config": SubConfigSpec(config_class=SparseMoeVlmExpertsConfig)}
    hidden_size: int = WIDTH
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    initializer_range: float = 0.2
    tie_word_embeddings: bool = False
    experts_config: SparseMoeVlmExpertsConfig | dict | None = None


class Layer(nn.Module):
    def __init__(self, layer: int, experts: SparseMoeVlmExpertsConfig):
        super().__init__()
        self.attention = nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH), "out": nn.Linear(WIDTH, WIDTH)})
        is_sparse = experts.is_sparse_layer(layer)
        self.ffn = SparseMoeVlmSparseMoeBlock(experts, layer) if is_sparse else nn.Linear(WIDTH, WIDTH)

    def forward(self, states, plan, pools):
        mixed = self.attention["q"](states).cumsum(dim=1) / torch.arange(1, states.shape[1] + 1)[:, None]
        states = states + self.attention["out"](mixed)
        if isinstance(self.ffn, SparseMoeVlmSparseMoeBlock):
            return states + self.ffn(states, plan, pools.get(self.ffn.layer_idx))
        return states + self.ffn(states)


class Decoder(nn.Module):
    def __init__(self, experts: SparseMoeVlmExpertsConfig):
        super().__init__()
        self.h = nn.ModuleList([Layer(layer, experts) for layer in range(experts.num_hidden_layers)])
        pools = {
            str(pool): make_experts(experts, experts.layer_expert_groups(layers[0], always_on=False))
            for pool, layers in experts.pools.items()
        }
        self.expert_pools = nn.ModuleDict(pools)
        self.pool_of = {layer: str(pool) for pool, layers in experts.pools.items() for layer in layers}

    def forward(self, states, plan):
        pools = {layer: self.expert_pools[pool] for layer, pool in self.pool_of.items()}
        for layer in self.h:
            states = layer(states, plan, pools)
        return states


class OtherHost(ExpertsHost):
    """
    `parts.0` is a connector of images, `parts.1` the decoder, `words` the embedding and `head` the language head, which
    has two modules.
    """

    config: OtherConfig

    def __init__(self, config):
        super().__init__(config)
        self.parts = nn.ModuleList([nn.Linear(8, WIDTH), Decoder(config.experts_config)])
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY))
        self.planner = RoutingPlanner(config.experts_config)
        self.post_init()

    def get_decoder(self):
        return self.parts[1]

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head[1]

    def forward(self, input_ids, pixels=None, labels=None):
        is_image = input_ids == IMAGE_TOKEN_ID
        states = self.words(input_ids)
        if pixels is not None:
            states = states.masked_scatter(is_image[..., None], self.parts[0](pixels))
        plan = self.planner.plan(TokenModalities(is_image.long(), None), states.device)
        logits = self.head(self.parts[1](states, plan))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def make_other_host(num_expert_shards: int = 1, **experts) -> OtherHost:
    """Returns a model with three layers. The first is dense, unless `mlp_only_layers` says otherwise."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "moe_intermediate_size": 24, "num_experts": 4}
    fields = sizes | {"mlp_only_layers": [0], "expert_groups": "isolated"} | experts
    config = OtherConfig(experts_config=SparseMoeVlmExpertsConfig(**fields, initializer_range=0.2))
    config.experts_config.num_expert_shards = num_expert_shards
    torch.manual_seed(0)
    return OtherHost(config).eval()


def make_other_inputs(seed: int = 0, images: bool = True) -> dict[str, torch.Tensor]:
    """Returns two rows, with four image tokens each if there are images."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, VOCABULARY, (2, 12), generator=generator)
    if not images:
        return {"input_ids": input_ids}
    input_ids[:, 2:6] = IMAGE_TOKEN_ID
    return {"input_ids": input_ids, "pixels": torch.randn(8, 8, generator=generator)}
