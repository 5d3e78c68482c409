"""Routing of one modality has collapsed at the start. Every balancing method recovers from that within 100 steps.

There are eight joint experts, two per token. All image tokens share a direction that the router sends to the first two
experts, so image tokens effectively use 2.4 of 8 experts while text uses nearly all. A tiny decoder then learns to
reproduce random tokens.
"""

import pytest
import torch

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.toolbox.routing import GroupRouting, count_batch, routing_statistics, update_router_bias
from tests.support.models import TEXT_CONFIG

pytestmark = pytest.mark.newest

STEPS = 100
FIRST_IMAGE_TOKEN = 50
METHODS = {
    "auxiliary loss": {"router_aux_loss_coef": 0.5},
    "loss-free bias": {"router_bias_update_rate": 0.01},
    "entropies": {"router_global_entropy_coef": 2.0, "router_local_entropy_coef": 0.02},
}


def collapsed_model(router: str, **balancing) -> SparseMoeVlmForCausalLM:
    torch.manual_seed(1)
    fields = {"num_hidden_layers": 1, "num_experts": 8, "expert_groups": "joint", "output_router_logits": True}
    fields |= {"router": router, "router_aux_loss_coef": 0.0}
    model = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | fields | balancing))
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[FIRST_IMAGE_TOKEN:] += 2 * direction
        gate = model.model.layers[0].mlp.gate.weight
        gate *= 0.5
        gate[:2] += 0.6 * direction
    return model.train()


def make_batch(seed: int, rows: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (rows, 24), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "mm_token_type_ids": (ids >= FIRST_IMAGE_TOKEN).long(), "labels": ids}


@torch.no_grad()
def routing(model) -> tuple[GroupRouting, GroupRouting]:
    """Returns the routing of text and of images for tokens that were not in the training batches."""
    batch = make_batch(seed=10**6, rows=64)
    counts = count_batch(model, batch, model(**batch).router_logits)
    text, image = routing_statistics(model.config, counts).rows
    return text, image


def train(model, steps: int = STEPS) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(steps):
        batch = make_batch(step)
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.config.router_bias_update_rate:
            update_router_bias(model, count_batch(model, batch, outputs.router_logits))


def start_collapsed(router: str, **balancing) -> SparseMoeVlmForCausalLM:
    model = collapsed_model(router, **balancing)
    text, image = routing(model)
    assert image.is_collapsed
    assert image.effective_experts < 2.5
    assert not text.is_collapsed
    return model


# The entropies are computed from probabilities. The affinities of a sigmoid router, scaled to sum to 1, are nearly even
# although its choice has collapsed, so the entropy losses hardly help it.
@pytest.mark.parametrize(
    ("router", "method"),
    [
        (router, method)
        for router in ("softmax", "top_p", "sigmoid")
        for method in METHODS
        if (router, method) != ("sigmoid", "entropies")
    ],
)
def test_balancing_recovers(router, method):
    model = start_collapsed(router, **METHODS[method])
    train(model)
    for row in routing(model):
        assert not row.is_collapsed
        assert row.dead_experts == 0
        assert row.effective_experts > 6
        assert row.max_violation < 1.2


@pytest.mark.parametrize("router", ["softmax", "top_p", "sigmoid"])
@pytest.mark.parametrize("coefficients", [{}, {"router_z_loss_coef": 0.01}], ids=["nothing", "z-loss only"])
def test_without_balancing_it_stays_collapsed(router, coefficients):
    """The z-loss only keeps logits small. It is a router loss, but it does not balance."""
    model = start_collapsed(router, **coefficients)
    train(model)
    _, image = routing(model)
    assert image.is_collapsed
    assert image.effective_experts < 2.5
    assert image.max_violation > 2.9
