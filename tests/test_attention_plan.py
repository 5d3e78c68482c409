"""The form of attention that a forward pass uses, and the modality ids that its cache stores."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from modeling_sparse_moe_vlm import attention_plan, modeling_sparse_moe_vlm
from modeling_sparse_moe_vlm.attention_parts import AttentionParts, RowParts, RunParts
from modeling_sparse_moe_vlm.cached_modalities import remember_modality_ids
from tests.support.models import make_inputs, make_model
from tests.test_modeling import make_mixed_inputs, shift_left

pytestmark = pytest.mark.newest

READ = {"output_modality_weights": True}
UNEQUAL = {"alpha_init": 0.8, "beta_init": 0.3}


@pytest.fixture
def plans(monkeypatch):
    """Records the plan of every forward pass."""
    planned: list = []

    def plan(*args, **kwargs):
        planned.append(attention_plan.plan_attention(*args, **kwargs))
        return planned[-1]

    monkeypatch.setattr(modeling_sparse_moe_vlm, "plan_attention", plan)
    return planned


def forms(plans) -> list:
    return [None if plan is None else type(plan) for plan in plans]


@torch.no_grad()
def test_prompts_use_runs_and_single_tokens_use_rows(plans):
    model, inputs = make_model(**UNEQUAL), make_inputs()
    model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert forms(plans) == [RunParts, RowParts, RowParts]
    assert [run.modality for run in plans[0].runs] == [0, 1, 0]
    assert [(run.start, run.stop) for run in plans[0].runs] == [(0, 2), (2, 6), (6, 14)]
    assert plans[1].rows == plans[1].weights == [], "nobody reads out"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@torch.no_grad()
def test_engines_that_keep_the_keys_raise_an_error(engine, plans):
    model, inputs = make_model(**UNEQUAL), make_inputs()
    model.config.text_config._attn_implementation = engine
    with pytest.raises(ValueError, match=f"needs the keys, but the engine '{engine}' keeps them .*`alpha_init`"):
        model(**inputs)


@pytest.mark.parametrize(
    ("settings", "arguments", "form"),
    [
        ({}, {}, type(None)),
        ({}, READ, RunParts),
        ({}, {"modality_guidance": 1.0}, RunParts),
        ({}, {"modality_priors": {"image": 2.0}}, RunParts),
        (UNEQUAL, {"output_attentions": True}, AttentionParts),
        (UNEQUAL | {"output_attentions": True, "attn_implementation": "eager"}, {}, AttentionParts),
        ({"learned_modality_priors": True}, {}, type(None)),
        (UNEQUAL | {"learned_modality_priors": True}, {}, RunParts),
    ],
)
@torch.no_grad()
def test_form_without_gradients(settings, arguments, form, plans):
    model = make_model(**settings)
    if "output_attentions" in settings or "output_attentions" in arguments:
        model.set_attn_implementation("eager")
        inputs = {name: value for name, value in make_inputs().items() if name != "attention_mask"}
        attentions = model(**inputs, **arguments).attentions
        assert [matrix.shape for matrix in attentions] == [(2, 4, 14, 14)] * 2
    else:
        model(**make_inputs(), **arguments)
    assert [type(plan) for plan in plans] == [form]


def test_form_with_gradients(plans):
    model, inputs = make_model(**UNEQUAL), make_inputs()
    model(**inputs)
    model(**inputs, **READ)
    model(**inputs, modality_guidance=1.0)
    assert forms(plans) == [RunParts, AttentionParts, AttentionParts], "guidance and weights have no gradient by runs"
    plans.clear()
    model.requires_grad_(False)
    model(**inputs, **READ)
    model.lm_head.weight.requires_grad_()  # behind the decoder
    model(**inputs, **READ)
    assert forms(plans) == [RunParts, RunParts]
    plans.clear()
    model.model.language_model.layers[0].mlp.gate.weight.requires_grad_()
    model(**inputs, **READ)
    assert forms(plans) == [AttentionParts]
    plans.clear()
    model.requires_grad_(False)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
    model(inputs_embeds=embeds, **inputs, **READ)
    assert forms(plans) == [AttentionParts]


@torch.no_grad()
def test_masks_that_differ_between_rows_and_dropout_use_channels(plans):
    model, inputs = make_model(**UNEQUAL), make_inputs()
    padded = shift_left(make_mixed_inputs())
    model(**padded)
    other = {name: value.clone() for name, value in inputs.items()}
    other["input_ids"][1], other["mm_token_type_ids"][1] = (
        inputs[name][1].roll(1) for name in ("input_ids", "mm_token_type_ids")
    )
    model(**other)
    assert forms(plans) == [AttentionParts, AttentionParts]
    plans.clear()
    # There is padding, although all rows have the same runs.
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, 13] = 0
    outputs = model(**inputs, **READ)
    assert forms(plans) == [AttentionParts]
    alone = model(**{name: value[1:, :13] if value.dim() == 2 else value[1:] for name, value in inputs.items()}, **READ)
    torch.testing.assert_close(outputs.logits[1:, :13], alone.logits, rtol=1e-4, atol=1e-4)
    plans.clear()
    inputs["attention_mask"][1, 13] = 1
    dropping = make_model(**UNEQUAL, attention_dropout=0.2)
    dropping(**inputs)
    dropping.train()
    dropping(**inputs)
    dropping(**{name: inputs[name][:, :1] for name in ("input_ids", "attention_mask")}, **READ)
    assert forms(plans) == [RunParts, AttentionParts, AttentionParts]
    dropping.eval().model.language_model.layers[1].self_attn.train()
    dropping(**inputs)
    assert forms(plans)[-1] is AttentionParts, "one layer is enough"


@torch.no_grad()
def test_rows_are_used_up_to_a_size(plans, monkeypatch):
    model, inputs = make_model(), make_inputs()
    token = {"input_ids": inputs["input_ids"][:, :1]}
    monkeypatch.setattr(attention_plan, "MAX_KEPT_ROW", 2 * 15 * 4)  # 15 keys, 4 heads, 2 rows
    for expected in (True, False):
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache, **READ)
        outputs = model(**token, past_key_values=cache, **READ)
        assert type(plans[-1]) is RowParts
        assert plans[-1].keeps_rows is expected
        assert len(plans[-1].rows) == (2 if expected else 0)
        assert [weights.shape for weights in outputs.modality_weights] == [(2, 4, 1, 2)] * 2
        monkeypatch.setattr(attention_plan, "MAX_KEPT_ROW", 2 * 15 * 4 - 1)
    model(**token, past_key_values=cache, modality_priors={"image": 2.0})
    assert not plans[-1].keeps_rows, "nobody reads out"


@pytest.mark.parametrize("kept", [True, False])
@torch.no_grad()
def test_weights_of_rows_stay_in_float32_under_autocast(kept, plans, monkeypatch):
    monkeypatch.setattr(attention_plan, "MAX_KEPT_ROW", 1000 if kept else 0)
    model, inputs = make_model(**UNEQUAL), make_inputs()
    cache = DynamicCache(config=model.config.text_config)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs, past_key_values=cache, **READ)
        outputs = model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, **READ)
    assert plans[-1].keeps_rows is kept
    for weights in (*outputs.modality_weights, *outputs.count_free_modality_weights):
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_layer_that_the_kernel_does_not_support_uses_channels(plans):
    """For example, a layer on another device or in another dtype."""
    model, inputs = make_model(**UNEQUAL), make_inputs()
    model.set_experts_implementation("eager")
    expected = model(**inputs, **READ)
    model.double()
    outputs = model(**inputs | {"pixel_values": inputs["pixel_values"].double()}, **READ)
    assert forms(plans) == [RunParts, RunParts]
    torch.testing.assert_close(outputs.logits, expected.logits.double(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(outputs.modality_weights, expected.modality_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- modality ids in caches

IDS = torch.tensor([[0, 1, 1], [1, 0, 0]])


def make_cache(kind: str):
    config = make_model().config.text_config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=6)


def fill(cache, length: int) -> None:
    for layer in range(2):
        cache.update(torch.zeros(2, 2, length, 8), torch.zeros(2, 2, length, 8), layer)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_ids_are_added_step_by_step(kind):
    cache = make_cache(kind)
    room = [0] * 3 if kind == "static" else []
    assert remember_modality_ids(IDS, cache).tolist() == [[0, 1, 1, *room], [1, 0, 0, *room]]
    fill(cache, 3)
    later = remember_modality_ids(torch.tensor([[1], [0]]), cache).tolist()
    assert later == [[0, 1, 1, 1, *room[1:]], [1, 0, 0, 0, *room[1:]]]
    # Rejected candidates of assisted decoding are overwritten.
    again = remember_modality_ids(torch.tensor([[0], [1]]), cache).tolist()
    assert again == [[0, 1, 1, 0, *room[1:]], [1, 0, 0, 1, *room[1:]]]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_gaps_in_the_ids_of_a_cache(kind):
    """A cache without ids is a gap, and so is a pass that did not store its ids: all later ids would be shifted."""
    cache = make_cache(kind)
    fill(cache, 3)
    assert remember_modality_ids(IDS[:, :1], cache) is None
    cache = make_cache(kind)
    remember_modality_ids(IDS, cache)
    fill(cache, 4)
    assert remember_modality_ids(IDS[:, :1], cache) is None
    assert remember_modality_ids(IDS[:1, :1], cache) is None, "another number of rows"


@torch.no_grad()
def test_a_pass_without_read_out_between_others():
    model, inputs = make_model(), make_inputs()
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache, **READ)
    token = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
    model(**token)
    with pytest.raises(ValueError, match="filled without the modality ids"):
        model(**token, **READ)


@torch.no_grad()
def test_ids_are_stored_while_learned_priors_are_equal(plans):
    """Later steps can use the ids, whether or not the priors are still equal when the cache is filled."""
    model, inputs = make_model(learned_modality_priors=True), make_inputs()
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    assert forms(plans) == [None], "plain attention"
    assert torch.equal(cache.modality_ids, inputs["mm_token_type_ids"])
    model.model.language_model.layers[0].self_attn.modality_log_priors[:, 1] = 1.0
    token = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": torch.ones(2, 15)}
    logits = model(**token, past_key_values=cache, **READ).logits
    assert logits.isfinite().all()
    assert forms(plans) == [None, RowParts]


@torch.no_grad()
def test_equal_learned_priors_need_no_ids():
    model, inputs = make_model(learned_modality_priors=True), make_inputs()
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    del cache.modality_ids  # as if other code had filled it
    assert isinstance(cache.layers[0], DynamicLayer)
    token = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}
    assert model(**token).logits.isfinite().all()
    with pytest.raises(ValueError, match="filled without the modality ids"):
        model(**token, **READ)
