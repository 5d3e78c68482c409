"""Adapters of experts in models that are compiled in full or in part, with and without graph breaks."""

import pytest
import torch
from peft import get_peft_model

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config, factor_expert_lora
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from tests.support.in_tree_moe import assert_equal, experts_of, randomise
from tests.support.models import make_inputs, make_model


def make_adapted(implementation: str):
    model = make_model(num_hidden_layers=1, expert_groups="joint")
    model.set_experts_implementation(implementation)
    return factor_expert_lora(randomise(get_peft_model(model, expert_lora_config(model, r=4)))).eval()


@pytest.mark.parametrize(
    ("implementation", "compiled", "paged"),
    [("eager", "blocks", False), ("eager", "blocks", True), ("grouped_mm", "experts", False)],
)
@torch.no_grad()
def test_compiled_modules_have_their_adapter(implementation, compiled, paged):
    """Also if there is a graph break within the experts, as in their readable forward."""
    adapted = make_adapted(implementation)
    inputs = make_inputs(images_per_row=0)
    expected = adapted(**inputs).logits
    with adapted.disable_adapter():
        without = adapted(**inputs).logits
    assert (expected - without).abs().max() > 0.1
    if paged:
        page_experts(adapted, 2)
    base = adapted.get_base_model()
    parts = {"blocks": [base.get_decoder().layers[0].mlp], "experts": experts_of(base).values()}
    for part in parts[compiled]:
        part.compile(backend="eager")
    assert_equal(adapted(**inputs).logits, expected, 2e-5)
    with adapted.disable_adapter():
        assert_equal(adapted(**inputs).logits, without, 2e-5)


@pytest.mark.parametrize("compiled", ["all", "layers"])
@torch.no_grad()
def test_names_of_rows_do_not_go_with_it(compiled):
    """Graphs that were compiled before a call with names would ignore them."""
    adapted = make_adapted("grouped_mm")
    inputs = make_inputs(images_per_row=0)
    if compiled == "layers":
        adapted.get_base_model().get_decoder().layers[0].compile(backend="eager")
    run = torch.compile(adapted, backend="eager") if compiled == "all" else adapted
    with pytest.raises(ValueError, match="`adapter_names` cannot be combined with `"):
        run(**inputs, adapter_names=["default", "__base__"])


def test_contract_of_torch():
    """Code that runs uncompiled within a compiled call can detect that."""
    seen = []

    def step(x):
        torch._dynamo.graph_break()
        look()
        return x + 1

    @torch.compiler.disable
    def look():
        seen.append("disabled" if torch._C._dynamo.eval_frame.get_eval_frame_callback() is None else "compiled")

    class Looks(list):
        def append(self, _):
            seen.append("compiled" if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None else "as it is")

    torch.compile(step, backend="eager")(torch.ones(1))
    Looks().append(None)
    assert seen == ["disabled", "as it is"]
    assert torch.nn.Identity()._compiled_call_impl is None
