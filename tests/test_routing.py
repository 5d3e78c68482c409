"""Routing equals the literal formulas, and depends on the modalities of tokens."""

import pytest
import torch

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.routing import RoutingPlanner, SparseMoeVlmTopKRouter, route, router_biases
from tests.support.models import IMAGE_TOKEN_ID, make_config, make_inputs, make_model
from tests.support.oracles import ARRANGEMENTS, MANY_GROUPS, route_token

pytestmark = pytest.mark.newest

DEVICE = torch.device("cpu")
EXPERTS = 6
SETTINGS = [
    (router, normalised, top_p)
    for router in ("softmax", "sigmoid", "top_p")
    for normalised in (True, False)
    for top_p in ((0.3, 0.6, 1.0) if router == "top_p" else (1.0,))
]


def as_dict(weights: torch.Tensor, index: torch.Tensor, num_experts: int = EXPERTS) -> list[dict[int, float]]:
    """Returns the weights of the experts of every token. Checks that unused slots are sentinels with weight 0."""
    tokens = []
    for token_weights, token_index in zip(weights.tolist(), index.tolist(), strict=True):
        used = {
            expert: weight for expert, weight in zip(token_index, token_weights, strict=True) if expert < num_experts
        }
        unused = [(e, w) for e, w in zip(token_index, token_weights, strict=True) if e >= num_experts]
        assert unused == [(num_experts, 0.0)] * (len(token_index) - len(used))
        tokens.append(used)
    return tokens


def literal(
    logits: torch.Tensor, k: list[int], router: str, normalised: bool, top_p: float, bias: torch.Tensor | None = None
) -> list[dict[int, float]]:
    tokens = []
    for number, (scores, token_k) in enumerate(zip(logits.double(), k, strict=True)):
        serving = scores.isfinite().nonzero().squeeze(1)
        own_bias = None if bias is None else bias[number % len(bias), serving].double()
        weights = route_token(scores[serving], token_k, router, normalised, top_p, own_bias)
        tokens.append({serving[expert].item(): weight.item() for expert, weight in weights.items()})
    return tokens


def random_logits(tokens: int = 64, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(0)) * scale


# ---------------------------------------------------------------- weights and choice


@pytest.mark.parametrize(("router", "normalised", "top_p"), SETTINGS)
@pytest.mark.parametrize("k", [1, 3, EXPERTS])
def test_route_is_the_literal_formula(k, router, normalised, top_p):
    logits = random_logits()
    weights, index = route(logits, top_k=k, router=router, norm_topk_prob=normalised, top_p=top_p)
    assert weights.dtype == logits.dtype
    assert index.dtype == torch.int64
    assert (weights.diff(dim=1) <= 0).all(), "best first"
    expected = literal(logits, [k] * 64, router, normalised, top_p)
    for actual, wanted in zip(as_dict(weights, index), expected, strict=True):
        assert actual == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("router", "normalised", "top_p"), SETTINGS)
def test_number_of_experts_may_differ_by_token_and_others_are_never_chosen(router, normalised, top_p):
    logits = random_logits()
    logits[1::3, [0, 4]] = -torch.inf  # tokens that experts 0 and 4 do not serve …
    logits[2::3, 1:] = -torch.inf  # … and some that only expert 0 serves
    k = [(4, 3, 1)[token % 3] for token in range(64)]
    slots = torch.tensor(k)[:, None]
    weights, index = route(logits, top_k=4, router=router, norm_topk_prob=normalised, top_p=top_p, num_slots=slots)
    for token, actual in enumerate(as_dict(weights, index)):
        assert len(actual) <= k[token]
        assert all(logits[token, expert].isfinite() for expert in actual)
    expected = literal(logits, k, router, normalised, top_p)
    for actual, wanted in zip(as_dict(weights, index), expected, strict=True):
        assert actual == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_top_p_takes_the_fewest_experts_that_reach_it():
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0, 0.0]])
    for top_p, number in ((0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4)):
        _, index = route(probabilities.log(), top_k=5, router="top_p", top_p=top_p)
        assert (index < EXPERTS).sum() == number, top_p


@pytest.mark.parametrize("bias", [None, torch.zeros(1, 12)], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_in_half_precision_are_broken_by_the_order_of_experts(dtype, bias):
    """Parts of a split dense block share a router row. They must not be mixed with the parts of another, tied block."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (500, 12), generator=generator).to(dtype)
    _, index = route(logits, top_k=5, bias=bias)
    expected = [sorted(range(12), key=lambda expert: -row[expert])[:5] for row in logits.tolist()]
    assert index.tolist() == expected


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "top_p"])
@pytest.mark.parametrize("offset", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_weights_are_finite_for_any_logits(router, offset):
    """Also if every sigmoid, or the exponential of every logit, is 0 or infinite in float32."""
    logits = (random_logits() + offset).requires_grad_()
    weights, _ = route(logits, top_k=2, router=router, top_p=0.9)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(64))
    weights[:, 0].sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("router", "normalised", "top_p"), SETTINGS)
def test_gradient_is_that_of_the_literal_formula(router, normalised, top_p):
    logits = random_logits(8)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    weights, index = route(logits, top_k=3, router=router, norm_topk_prob=normalised, top_p=top_p)
    importance = torch.arange(1.0, 1.0 + EXPERTS + 1)  # another one per expert
    (weights * importance[index]).sum().backward()

    exact = logits.detach().double().requires_grad_()
    for scores in exact:
        serving = [0, 1, 3, 4, 5]
        chosen = route_token(scores[serving], 3, router, normalised, top_p)
        sum(weight * importance[serving[expert]] for expert, weight in chosen.items()).backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=1e-4, atol=1e-5)
    # The weight of a single expert, scaled to sum to 1, is constant.
    assert (logits.grad.abs().sum() > 0) == (not normalised or (index[:, 1] < EXPERTS).any())


# ---------------------------------------------------------------- the bias of loss-free balancing


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(("router", "normalised", "top_p"), SETTINGS)
def test_bias_affects_the_choice_but_not_the_weights(router, normalised, top_p, rows):
    logits = random_logits()
    logits[1::3, [0, 4]] = -torch.inf
    bias = torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(1)) * 0.5
    arguments = {"top_k": 3, "router": router, "norm_topk_prob": normalised, "top_p": top_p}
    weights, index = route(logits, **arguments, bias=bias)
    actual = as_dict(weights, index)
    for token, wanted in zip(actual, literal(logits, [3] * 64, router, normalised, top_p, bias), strict=True):
        assert token == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    unbiased = as_dict(*route(logits, **arguments))
    assert sum(set(token) != set(other) for token, other in zip(actual, unbiased, strict=True)) > 8
    without_effect = route(logits, **arguments, bias=torch.zeros(1, EXPERTS))
    for token, other in zip(as_dict(*without_effect), unbiased, strict=True):
        assert token == pytest.approx(other)


def test_bias_never_chooses_experts_that_do_not_serve_the_token():
    logits = random_logits()
    logits[:, [0, 4]] = -torch.inf
    bias = torch.tensor([[100.0, 0.0, 0.0, 0.0, 100.0, 0.0]])
    _, index = route(logits, top_k=4, bias=bias)
    assert not torch.isin(index, torch.tensor([0, 4])).any()


def test_bias_has_no_gradient_and_logits_have_that_of_the_weights():
    logits = random_logits(8).requires_grad_()
    bias = torch.randn(1, EXPERTS).requires_grad_()
    weights, index = route(logits, top_k=2, bias=bias)
    (weights * torch.arange(2.0)).sum().backward()
    assert bias.grad is None
    chosen = logits.detach().gather(-1, index).requires_grad_()
    (torch.softmax(chosen, dim=-1) * torch.arange(2.0)).sum().backward()
    torch.testing.assert_close(logits.grad.gather(-1, index), chosen.grad)


def test_each_modality_has_its_own_bias():
    config = make_config(expert_groups="joint", router_bias_update_rate=1e-3).text_config
    router = SparseMoeVlmTopKRouter(config, config.layer_expert_groups(0))
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.tensor([[9.0, 9, 0, 0], [0, 0, 9, 9]]))
    hidden_states, ids = torch.randn(6, 32), torch.tensor([0, 1, 0, 1, 1, 0])
    index = router(hidden_states, modality_ids=ids)[2]
    assert torch.equal(index >= 2, (ids == 1)[:, None].expand(-1, 2))
    assert (router(hidden_states)[2] < 2).all(), "all text"


def test_model_without_bias_has_none():
    model = make_model()
    assert router_biases(model) is None
    assert not [name for name in model.state_dict() if "e_score_correction_bias" in name]


def test_bias_is_saved_and_stays_in_float32(tmp_path):
    model = make_model(expert_groups="isolated", router_bias_update_rate=0.0)
    biases = router_biases(model)
    assert [bias.shape for bias in biases] == [(2, 4)] * 2
    assert all((bias == 0).all() for bias in biases)
    for bias in biases:
        bias.normal_()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded, report = SparseMoeVlmForConditionalGeneration.from_pretrained(
            tmp_path, dtype=dtype, output_loading_info=True
        )
        assert not any(report.values())
        assert loaded.lm_head.weight.dtype == dtype
        for bias, expected in zip(router_biases(loaded), biases, strict=True):
            assert bias.dtype == torch.float32
            assert torch.equal(bias, expected)
    assert all(bias.dtype == torch.float32 for bias in router_biases(model.bfloat16()))


def test_bias_starts_at_zero_in_a_checkpoint_without(tmp_path):
    """Loss-free balancing can be enabled later, and then starts with biases of zero."""
    make_model().save_pretrained(tmp_path)
    config = make_config(router_bias_update_rate=1e-3)
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, config=config)
    assert all((bias == 0).all() for bias in router_biases(loaded))


# ---------------------------------------------------------------- the router


def test_router_masks_before_anything_else():
    config = make_config(expert_groups="isolated").text_config
    router = SparseMoeVlmTopKRouter(config, config.layer_expert_groups(0))
    torch.nn.init.normal_(router.weight)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    hidden_states = torch.randn(5, 32)
    served = torch.tensor([[True, True, False, False]] * 3 + [[False, False, True, True]] * 2)
    logits, weights, index = router(hidden_states, served)
    plain = hidden_states @ router.weight.T
    assert torch.equal(logits == -torch.inf, ~served)
    torch.testing.assert_close(logits[served], plain[served])
    assert (index[:3] < 2).all()
    assert (index[3:] >= 2).all()
    # Probabilities are computed only over experts that serve the token, as if the others did not exist.
    expected = torch.softmax(plain[:3, :2], dim=-1).sort(descending=True).values
    torch.testing.assert_close(weights[:3], expected)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_gradient_reaches_the_router(name):
    model = make_model(**ARRANGEMENTS[name])
    inputs = make_inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in model.model.language_model.layers:
        gradient = layer.mlp.gate.weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_routing_of_a_token_does_not_depend_on_its_batch(name):
    """Every row has the same routing in every layer: by itself, in a batch, in another order, and with any padding."""
    model = make_model(**ARRANGEMENTS[name])
    for bias in router_biases(model) or []:
        bias.normal_(std=0.3)
    inputs = make_inputs(batch_size=3)
    inputs["input_ids"][2, 2:6] = torch.tensor([10, 11, 12, 13])  # a row without an image
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN_ID).long()
    images = inputs.pop("pixel_values")[:2]

    @torch.no_grad()
    def chosen(rows: list[int], left: int = 0, right: int = 0) -> list[torch.Tensor]:
        def pad(tensor, value=0):
            return torch.nn.functional.pad(tensor[rows], (left, right), value=value)

        own = [images[row] for row in rows if row < 2]
        logits = model(
            input_ids=pad(inputs["input_ids"]),
            attention_mask=pad(inputs["attention_mask"]),
            mm_token_type_ids=pad(inputs["mm_token_type_ids"]),
            pixel_values=torch.stack(own) if own else None,
            output_router_logits=True,
        ).router_logits
        real = slice(left, left + 14)
        return [layer.view(len(rows), -1, layer.shape[-1])[:, real] for layer in logits]

    together = chosen([0, 1, 2])
    assert len(together) == 2
    for rows, padding in [
        ([0], {}),
        ([1], {}),
        ([2], {}),
        ([2, 0, 1], {}),
        ([0, 1, 2], {"left": 3}),
        ([2, 1], {"right": 5}),
    ]:
        for expected, actual in zip(together, chosen(rows, **padding), strict=True):
            torch.testing.assert_close(actual, expected[rows], rtol=1e-4, atol=1e-4)
            assert torch.equal(actual.topk(2).indices, expected[rows].topk(2).indices)


# ---------------------------------------------------------------- the planner


def plan(ids, mask=None, num_tokens=0, **text_config):
    return RoutingPlanner(make_config(**text_config).text_config)(ids, DEVICE, mask, num_tokens)


def test_nothing_to_plan_if_all_tokens_are_treated_equally():
    ids = torch.tensor([[0, 1, 0]])
    assert plan(ids, expert_groups="joint") is None
    assert plan(None, expert_groups="joint") is None
    assert plan(ids, expert_groups="joint", num_experts_per_tok_by_modality={"text": 1, "image": 1}) is None


def test_plan_has_what_bias_and_capacity_need():
    ids, mask = torch.tensor([[0, 1, 0], [1, 0, 0]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    biased = plan(ids, mask, 6, expert_groups="joint", router_bias_update_rate=0.0)
    assert biased.modality_ids.tolist() == [0, 1, 0, 1, 0, 0]
    assert biased.real is None
    limited = plan(ids, mask, 6, expert_groups="joint", expert_capacity_factor=1.0)
    assert limited.modality_ids.tolist() == [0, 1, 0, 1, 0, 0]
    assert limited.real.tolist() == [False] + [True] * 5
    for text in (None, torch.zeros_like(ids)):
        limited = plan(text, mask, 6, expert_groups="joint", expert_capacity_factor=1.0)
        assert limited.modality_ids is None
        assert limited.real.tolist() == [False] + [True] * 5
    plain = plan(ids, mask, 6)
    assert plain.modality_ids is None
    assert plain.real is None


def test_plan_of_a_mixed_batch():
    routing = plan(torch.tensor([[0, 1, 1], [0, 0, 0]]), expert_groups=MANY_GROUPS, num_experts=None)
    assert {name: None if rows is None else rows.tolist() for name, rows in routing.tokens.items()} == {
        "text": [0, 3, 4, 5],
        "image": [1, 2],
        "vision": [1, 2],
        "joint": None,
        "everyone": None,
    }
    (served,) = routing.served.values()
    text, image = [True] * 5 + [False] * 4, [False] * 2 + [True] * 7  # two text, three joint, four image experts
    assert served.tolist() == [text, image, image, text, text, text]
    assert routing.num_slots is None


@pytest.mark.parametrize("ids", [None, torch.zeros(2, 3, dtype=torch.long)], ids=["unknown", "known"])
def test_plan_of_an_all_text_batch(ids):
    routing = plan(ids, expert_groups=MANY_GROUPS, num_experts=None)
    assert routing.tokens["text"] is None
    assert routing.tokens["joint"] is None
    assert routing.tokens["image"].tolist() == routing.tokens["vision"].tolist() == []
    (served,) = routing.served.values()
    assert (served == torch.tensor([True] * 5 + [False] * 4)).all()


def test_plan_of_an_all_image_batch():
    routing = plan(torch.ones(2, 3, dtype=torch.long), expert_groups=MANY_GROUPS, num_experts=None)
    assert routing.tokens["image"] is None
    assert routing.tokens["vision"] is None
    assert routing.tokens["text"].tolist() == []


def test_plan_with_further_modalities():
    groups = [
        {"name": "words", "num_experts": 2, "modalities": ["text", "audio"]},
        {"name": "pixels", "num_experts": 2, "modalities": ["video", "image"]},
        {"name": "rest", "num_experts": 2, "modalities": ["depth", "audio", "image"]},
        {"name": "sound", "num_experts": 1, "modalities": ["audio"], "always_on": True},
    ]
    routing = plan(
        torch.tensor([[0, 1, 2, 3, 4]]),
        expert_groups=groups,
        num_experts=None,
        modalities=["text", "image", "video", "audio", "depth"],
        num_experts_per_tok_by_modality={"audio": 4, "video": 1},
    )
    assert {name: rows.tolist() for name, rows in routing.tokens.items()} == {
        "words": [0, 3],
        "pixels": [1, 2],
        "rest": [1, 3, 4],
        "sound": [3],
    }
    (served,) = routing.served.values()
    assert served.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    assert routing.num_slots.tolist() == [[2], [2], [1], [4], [2]]


def test_groups_by_layer_have_a_mask_per_arrangement():
    groups = [
        {"name": "text", "num_experts": 2, "modalities": ["text"], "layers": [0]},
        {"name": "image", "num_experts": 3, "modalities": ["image"], "layers": [0, 1]},
        {"name": "joint", "num_experts": 4, "layers": [1, 2]},
    ]
    routing = plan(torch.tensor([[0, 1]]), expert_groups=groups, num_experts=None, num_hidden_layers=3)
    assert {key: served.int().tolist() for key, served in routing.served.items()} == {
        "text+image": [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]],
        "image+joint": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    }


@pytest.mark.parametrize("name", ["isolated", "hybrid", "many-by_modality"])
def test_masks_of_a_traced_pass_are_the_rows_of_an_eager_one(name, monkeypatch):
    ids = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])
    eager = plan(ids, **ARRANGEMENTS[name])
    monkeypatch.setattr("modeling_sparse_moe_vlm.routing.is_tracing", lambda tensor: True)
    traced = plan(ids, **ARRANGEMENTS[name])
    for group, rows in eager.tokens.items():
        if rows is None:
            assert traced.tokens[group] is None
        else:
            assert traced.tokens[group].dtype == torch.bool
            assert traced.tokens[group].nonzero().squeeze(1).tolist() == rows.tolist()
    for key, served in eager.served.items():
        assert torch.equal(traced.served[key], served)


@pytest.mark.parametrize("unknown", [2, -1])
def test_unknown_modality_is_an_error(unknown):
    with pytest.raises(ValueError, match=r"mm_token_type_ids.*between 0 and 1"):
        plan(torch.tensor([[0, 1, unknown]]), expert_groups="isolated")
