"""Attention is intercepted only where requested, and everything is restored afterwards."""

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_sparse_moe_vlm.toolbox.modality_weights import modality_weights
from tests.support.in_tree_models import make_inputs, make_model


def registered() -> dict:
    return {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in ("eager", "sdpa", "flex_attention")}


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_everything_is_restored_afterwards(implementation):
    model, inputs = make_model(), make_inputs()
    model.set_attn_implementation(implementation)
    model(**inputs)  # Transformers also registers hooks
    before, local, num_hooks = registered(), dict(ALL_ATTENTION_FUNCTIONS._local_mapping), hooks(model)
    with modality_weights(model) as weights:
        assert registered() != before
        assert model.config.text_config._attn_implementation == implementation
        model(**inputs)
    with pytest.raises(ZeroDivisionError), modality_weights(model):
        raise ZeroDivisionError
    assert registered() == before
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == local
    assert hooks(model) == num_hooks
    model(**inputs)
    assert len(weights.steps) == 1


def test_an_earlier_override_is_restored(monkeypatch):
    def override(*args, **kwargs):
        return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", override)
    with modality_weights(make_model()):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not override
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is override


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_later_override_stays(implementation):
    """It may call the function that it replaced, which then only passes the call on."""
    model, inputs = make_model(), make_inputs()
    model.set_attn_implementation({"text_config": implementation})
    plain, calls = model(**inputs).logits, []
    with modality_weights(model, modality_priors={"image": 30.0}) as weights:
        ours = ALL_ATTENTION_FUNCTIONS[implementation]

        def override(*args, **kwargs):
            calls.append(1)
            return ours(*args, **kwargs)

        ALL_ATTENTION_FUNCTIONS[implementation] = override
        assert not torch.allclose(model(**inputs).logits, plain)
    try:
        assert ALL_ATTENTION_FUNCTIONS[implementation] is override
        assert torch.equal(model(**inputs).logits, plain)
        # Two layers in two passes. The vision tower has one layer, with SDPA.
        assert len(calls) == {"eager": 4, "sdpa": 6}[implementation]
        assert len(weights.steps) == 1
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]


def test_contract_with_the_functions_of_the_library():
    """Tells the function of the library from an override with the same name."""
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS._global_mapping
    assert "eager" not in ALL_ATTENTION_FUNCTIONS._global_mapping
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = print
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is print
    assert ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"] is before
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_contexts_of_several_models_are_independent(implementation):
    """They can end in any order. Models without a context are not affected, even with the same backend."""
    llava, qwen, other = make_model(), make_model("qwen3_vl"), make_model("idefics3")
    for model in (llava, qwen, other):
        model.set_attn_implementation(implementation)
    inputs = {name: make_inputs(name) for name in ("llava", "qwen3_vl", "idefics3")}
    plain = other(**inputs["idefics3"]).logits
    before = registered()
    first, second = modality_weights(llava), modality_weights(qwen, modality_priors={"image": 2.0})
    first_weights, second_weights = first.__enter__(), second.__enter__()
    llava(**inputs["llava"])
    qwen(**inputs["qwen3_vl"])
    first.__exit__(None, None, None)
    qwen(**inputs["qwen3_vl"])
    assert torch.equal(other(**inputs["idefics3"]).logits, plain)
    second.__exit__(None, None, None)
    assert [len(first_weights.steps), len(second_weights.steps)] == [1, 2]
    assert torch.equal(*(step.modality_weights[1] for step in second_weights.steps))
    assert registered() == before
    compiled: list = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph.forward)(torch.ones(2))
    assert compiled, "the compiler works again"


def test_one_context_per_model():
    model, inputs = make_model(), make_inputs()
    with modality_weights(model) as weights:
        with pytest.raises(ValueError, match="read out or steered already"), modality_weights(model):
            pass
        model(**inputs)
    assert len(weights.steps) == 1


@pytest.mark.extensive
@torch.no_grad()
def test_compiled_models_run_uncompiled():
    model, inputs = make_model(), make_inputs()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(**inputs).logits
    for prior in (1.0, 2.0):
        with modality_weights(compiled, modality_priors={"image": prior}) as weights:
            outputs = compiled(**inputs).logits
        with modality_weights(model, modality_priors={"image": prior}) as expected:
            assert torch.equal(model(**inputs).logits, outputs)
        assert torch.equal(weights.alpha, expected.alpha)
    torch.testing.assert_close(compiled(**inputs).logits, plain)


@torch.no_grad()
def test_backends_that_compile_themselves_stay_compiled(monkeypatch):
    graphs: list = []
    compiled = torch.compile(
        torch.nn.functional.scaled_dot_product_attention,
        backend=lambda graph, _: graphs.append(graph) or graph.forward,
    )

    def attention(module, query, key, value, attention_mask, *, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return compiled(query, key, value, attention_mask, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "compiled", attention)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "compiled", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, inputs = make_model(), make_inputs()
    model.set_attn_implementation({"text_config": "compiled"})
    with modality_weights(model):
        model(**inputs)
    assert graphs


def test_an_unregistered_backend_is_refused():
    model = make_model()
    model.config.text_config._attn_implementation_internal = "nobody/knows"
    message = r"`nobody/knows` is not in `ALL_ATTENTION_FUNCTIONS`: choose another backend"
    with pytest.raises(ValueError, match=message), modality_weights(model):
        pass
