"""The plan of a forward pass that sparse layers get, for all tokens or for the last tokens of each row."""

import pytest
import torch

from modeling_sparse_moe_vlm.token_modalities import TokenModalities
from modeling_sparse_moe_vlm.upcycled_layers import TokenPlan
from tests.support.upcycled import make_few_experts

pytestmark = pytest.mark.newest

IDS = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])


def make_plan() -> TokenPlan:
    model = make_few_experts("llava", expert_groups="isolated")
    tokens = TokenModalities(IDS, torch.tensor([[True] * 4, [True, True, True, False]]))
    return TokenPlan.of(model.experts_config, model.routing_planner, tokens, IDS.device)


def text_and_image_tokens(plan: TokenPlan, *shape: int) -> tuple[list[int], list[int]]:
    tokens = plan.routing_of(torch.zeros(*shape, 8)).tokens
    return tokens["text"].tolist(), tokens["image"].tolist()


def test_layers_that_run_the_last_tokens_have_their_own_plan():
    plan = make_plan()
    assert text_and_image_tokens(plan, 2, 4) == ([0, 3, 5, 6], [1, 2, 4, 7])
    assert text_and_image_tokens(plan, 8) == ([0, 3, 5, 6], [1, 2, 4, 7])
    assert plan.of_last_tokens == {}
    assert text_and_image_tokens(plan, 2, 2) == ([1, 2], [0, 3])
    assert text_and_image_tokens(plan, 2, 3) == ([2, 3, 4], [0, 1, 5])
    assert text_and_image_tokens(plan, 2, 1) == ([0], [1])
    assert list(plan.of_last_tokens) == [2, 3, 1]
    assert plan.routing_of(torch.zeros(2, 2, 8)) is plan.of_last_tokens[2]


@pytest.mark.parametrize("shape", [(2, 5), (4,), (1, 4), (3, 4), (2, 1, 2)])
def test_other_tokens_than_those_of_the_call(shape):
    plan = make_plan()
    number = torch.Size(shape).numel()
    with pytest.raises(ValueError, match=f"runs {number} tokens, but the call had 8: the base model adds or drops"):
        plan.routing_of(torch.zeros(*shape, 8))


def test_tokens_of_unknown_modality_share_the_plan():
    plan = make_plan()._replace(tokens=TokenModalities(None, None))
    assert plan.routing_of(torch.zeros(1, 3, 8)) is plan.routing
    only_padding = make_plan()._replace(tokens=TokenModalities(None, torch.ones(2, 4, dtype=torch.bool)))
    assert only_padding.routing_of(torch.zeros(2, 4, 8)) is only_padding.routing
    with pytest.raises(ValueError, match="the call had 8"):
        only_padding.routing_of(torch.zeros(2, 5, 8))
