"""LoRA on the experts of upcycled models: selected by modality, factored, saved, loaded, and with paging."""

import warnings

import peft
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_sparse_moe_vlm.toolbox.expert_lora import (
    busiest_experts,
    expert_lora_config,
    factor_expert_lora,
    load_expert_lora,
)
from modeling_sparse_moe_vlm.toolbox.expert_lora.adapted_layer import FactoredExpertsLayer
from modeling_sparse_moe_vlm.toolbox.expert_modules import expert_banks
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from modeling_sparse_moe_vlm.toolbox.routing import measure_routing, routing_statistics
from modeling_sparse_moe_vlm.toolbox.training import freeze_text
from tests.support.batches import collate
from tests.support.in_tree_models import TEXT
from tests.support.upcycled import KINDS, make_inputs, make_rows, make_upcycled


@torch.no_grad()
def read(model, kind, images: bool = True) -> torch.Tensor:
    return model.eval()(**make_inputs(kind, images=images)).logits


def train(model, kind, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    batch = collate(make_rows(kind))
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("groups", ["isolated", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_images_do_not_change_text(kind, groups, tmp_path):
    """Factored adapters are trained, have PEFT's format on disk, and load again with the same outputs."""
    model = make_upcycled(kind, groups)
    text, images = read(model, kind, images=False), read(model, kind)
    config = expert_lora_config(model, modalities=["image"], r=4, lora_alpha=8)
    expected = ".experts.image" if groups == "isolated" else ".shared_experts.image"
    names = [*(config.target_parameters or []), *(config.target_modules or [])]
    assert names
    assert all(expected in name for name in names)
    adapted = peft.get_peft_model(model, config)
    if groups == "isolated":
        layers = [module for module in adapted.modules() if isinstance(module, FactoredExpertsLayer)]
        assert len(layers) == 4  # two stacks in each of two layers
    assert torch.equal(read(adapted, kind), images)
    train(adapted, kind)
    assert torch.equal(read(adapted, kind, images=False), text)
    trained = read(adapted, kind)
    assert (trained - images).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)

    if groups == "isolated":
        loaded = load_expert_lora(make_upcycled(kind, groups), tmp_path)
    else:  # dense networks, which PEFT adapts itself
        loaded = peft.PeftModel.from_pretrained(make_upcycled(kind, groups), tmp_path)
    torch.testing.assert_close(read(loaded, kind), trained)
    plain = peft.PeftModel.from_pretrained(make_upcycled(kind, groups), tmp_path)
    torch.testing.assert_close(read(plain, kind), trained, atol=1e-4, rtol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(read(merged, kind), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_factored_adapters_equal_those_of_peft(kind):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    plain = peft.get_peft_model(
        make_upcycled(kind, "joint"), peft.LoraConfig(target_parameters=targets, target_modules=[], r=4)
    )
    torch.manual_seed(0)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = read(plain, kind)
    assert (expected - read(make_upcycled(kind, "joint"), kind)).abs().max() > 0.1
    factored = factor_expert_lora(plain)
    torch.testing.assert_close(read(factored, kind), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_busiest_experts_of_a_modality(kind):
    model = make_upcycled(kind, "joint")
    counts = measure_routing(model, [make_inputs(kind)])
    busiest = busiest_experts(model, counts, share=0.25, modality="image")
    decoder = "model.layers" if kind == "llama" else "model.language_model.layers"
    assert list(busiest) == [f"{decoder}.{layer}.mlp.experts" for layer in range(2)]
    for layer, chosen in enumerate(busiest.values()):
        of_images = counts.wanted[layer, 1].tolist()
        assert sorted((of_images[expert] for expert in chosen), reverse=True) == sorted(of_images)[:-3:-1]
    of_layer = {name: experts for name, experts in busiest.items() if ".1." in name}
    config = expert_lora_config(model, experts=of_layer, layers=[1], routers=True, attention=True, r=2)
    assert set(config.target_parameters) == {f"{decoder}.1.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")}
    assert config.modules_to_save == [f"{decoder}.1.mlp.gate"]
    assert config.target_modules == {f"{decoder}.1.self_attn.{name}_proj" for name in "qkvo"}


@pytest.mark.parametrize(
    ("targets", "warns"), [(["gate_proj", "q_proj"], True), (["w1", "q_proj"], True), (["q_proj", "v_proj"], False)]
)
def test_a_warning_about_adapters_that_miss_the_routed_experts(targets, warns):
    """In `hybrid`, names of dense blocks match only always-on experts, and names of the base match nothing."""
    model = make_upcycled("llava", "hybrid")
    config = peft.LoraConfig(target_modules=targets, r=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.get_peft_model(model, config)
    assert any("no routed expert gets an adapter" in str(warning.message) for warning in caught) == warns


@pytest.mark.parametrize("groups", ["isolated", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_paged_experts_with_adapters(kind, groups):
    """With a budget for one token's experts, outputs equal those of the resident model, with and without adapters."""
    model = make_upcycled(kind, groups)
    resident = read(model, kind)
    answer = model.generate(**make_inputs(kind), max_new_tokens=4, do_sample=False)
    with page_experts(model, expert_cache=2) as paged:
        assert set(paged.slots.values()) == {2}
        torch.testing.assert_close(read(model, kind), resident)
        assert torch.equal(model.generate(**make_inputs(kind), max_new_tokens=4, do_sample=False), answer)
        assert paged.total("decode").misses > 0
    adapted = peft.get_peft_model(model, expert_lora_config(model, r=2, init_lora_weights=False))
    expected = read(adapted, kind)
    assert (expected - resident).abs().max() > 1e-2
    with page_experts(adapted, expert_cache=2):
        torch.testing.assert_close(read(adapted, kind), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_uses_the_adapter_that_it_names(kind):
    """Although each group gets only some of the tokens."""
    model, inputs = make_upcycled(kind), make_inputs(kind)
    names = ["one", "two"]
    adapted = peft.get_peft_model(model, expert_lora_config(model, r=2, init_lora_weights=False), "one")
    adapted.add_adapter("two", expert_lora_config(model, r=2, init_lora_weights=False))
    factor_expert_lora(adapted)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        together = adapted.eval()(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        adapted.set_adapter(name)
        alone = read(adapted, kind)
        torch.testing.assert_close(together[row][real[row]], alone[row][real[row]], atol=1e-4, rtol=1e-4)
        other = 1 - row
        assert (together[other] - alone[other])[real[other]].abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_layers_share(kind):
    """Statistics sum over the layers of a pool. Adapters, routers and slots belong to the pool."""
    model = make_upcycled(kind, "isolated", expert_pool=[0, 0], pool_start="first")
    pool = f"{'model' if kind == 'llama' else 'model.language_model'}.expert_pools.0"
    counts = measure_routing(model, [make_inputs(kind)])
    rows = routing_statistics(model.config.experts_config, counts).rows
    assert [(row.place, row.group, row.modality, row.num_tokens) for row in rows] == [
        ("pool_0", "text", "text", 2 * 16),
        ("pool_0", "image", "image", 2 * 8),
    ]
    wanted = counts.wanted[:, 1].sum(dim=0)[4:].tolist()
    busiest = busiest_experts(model, counts, share=0.25, modality="image")
    assert busiest == {f"{pool}.image": [wanted.index(max(wanted))]}
    resident = read(model, kind)
    with page_experts(model, expert_cache=4) as paged:
        assert set(paged.slots) == {f"{pool}.text", f"{pool}.image"}
        torch.testing.assert_close(read(model, kind), resident)
    config = expert_lora_config(model, modalities=["image"], routers=True, r=2, init_lora_weights=False)
    assert set(config.target_parameters) == {f"{pool}.image.{name}" for name in ("gate_up_proj", "down_proj")}
    layers = pool.replace("expert_pools.0", "layers")
    assert config.modules_to_save == [f"{layers}.{layer}.mlp.gate" for layer in range(2)]
    text = read(model, kind, images=False)
    adapted = peft.get_peft_model(model, config)
    assert (read(adapted, kind) - resident).abs().max() > 1e-2
    assert torch.equal(read(adapted, kind, images=False), text)


def test_a_mixture_of_experts_whose_dense_layers_were_upcycled():
    """The experts of the base belong to no group, serve every token, and are not changed when text is frozen."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    dense = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT | sizes, mlp_only_layers=[1])).eval()
    model = make_upcycled(dense=dense, include_dense_layers_of_moe=True)
    own = [f"model.layers.1.mlp.experts.{group}" for group in ("text", "image")]
    before = ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    banks = {bank.name: (bank.group, bank.layers) for bank in expert_banks(model)}
    assert banks == {before[0]: (None, (0,)), own[0]: ("text", (1,)), own[1]: ("image", (1,)), before[1]: (None, (2,))}
    counts = measure_routing(model, [make_inputs("llama")])
    busiest = busiest_experts(model, counts, share=0.25, modality="image")
    assert busiest == {own[1]: [counts.wanted[0, 1, 4:].argmax().item()]}
    stacks = ("gate_up_proj", "down_proj")
    config = expert_lora_config(model, modalities=["image"], r=2)
    assert config.target_parameters == [f"{own[1]}.{stack}" for stack in stacks]
    everything = expert_lora_config(model, r=2)
    assert set(everything.target_parameters) == {f"{name}.{stack}" for name in (*own, *before) for stack in stacks}
    freeze_text(model).remove()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"model.layers.1.mlp.gate.weight", *(f"{own[1]}.{stack}" for stack in stacks)}
