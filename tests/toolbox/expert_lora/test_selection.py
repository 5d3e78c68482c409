"""Selection of experts: only the selected ones are trained, and selections that the model does not have are errors."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.expert_lora import busiest_experts, expert_lora_config, num_adapter_parameters
from modeling_sparse_moe_vlm.toolbox.expert_lora.adapted_layer import FactoredExpertsLayer
from modeling_sparse_moe_vlm.toolbox.routing import count_batch, measure_routing, routing_statistics, update_router_bias
from tests.support.in_tree_models import TEXT
from tests.support.in_tree_moe import MODELS, make_inputs, make_model
from tests.support.models import make_config
from tests.support.models import make_inputs as make_our_inputs
from tests.support.models import make_model as make_ours

LAYERS = "model.language_model.layers"
GROUPS = [
    {"name": "joint", "num_experts": 2},
    {"name": "words", "num_experts": 3, "modalities": ["text"]},
    {"name": "views", "num_experts": 2, "modalities": ["image"], "always_on": True},
]
STACKS = ["gate_up_proj", "down_proj"]
LINEARS = ["gate_proj", "up_proj", "down_proj"]


def train(model, inputs, steps: int = 2):
    """Trains for a few large steps, so that the adapters, which start at zero, matter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapted(model, inputs=None, **selection):
    """Returns the model with trained adapters."""
    torch.manual_seed(0)
    inputs = make_inputs(model) if inputs is None else inputs
    return train(get_peft_model(model, expert_lora_config(model, **selection)), inputs)


def changes(model, inputs=None, **selection) -> dict[str, torch.Tensor]:
    """Returns the changes of the weights after training and merging, by name."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = adapted(model, inputs, **selection).merge_and_unload().state_dict()
    assert before.keys() == after.keys()
    return {name: after[name] != before[name] for name in before if not torch.equal(after[name], before[name])}


def named(prefixes, names):
    return {f"{prefix}.{name}" for prefix in prefixes for name in names}


@pytest.mark.parametrize("name", MODELS)
def test_all_experts_and_nothing_else_by_default(name):
    model = make_model(name)
    stacks = {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "proj" in name}
    config = expert_lora_config(model, r=2)
    assert set(config.target_parameters) == stacks
    assert config.target_modules == set()
    model = get_peft_model(model, config)
    layers = [module for module in model.modules() if isinstance(module, FactoredExpertsLayer)]
    assert sorted(layer.stack_name for layer in layers) == sorted(stacks)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("text_config", "selection", "stacks", "linears"),
    [
        ({}, {}, named([f"{LAYERS}.{i}.mlp.experts" for i in (0, 1)], STACKS),
         named([f"{LAYERS}.{i}.mlp.shared_experts.{m}" for i in (0, 1) for m in ("text", "image")], LINEARS)),
        ({}, {"modalities": ["image"], "layers": [1]}, set(),
         named([f"{LAYERS}.1.mlp.shared_experts.image"], LINEARS)),
        ({}, {"groups": ["joint"]}, named([f"{LAYERS}.{i}.mlp.experts" for i in (0, 1)], STACKS), set()),
        ({}, {"projections": ["down"], "layers": [0]}, {f"{LAYERS}.0.mlp.experts.down_proj"},
         named([f"{LAYERS}.0.mlp.shared_experts.{m}" for m in ("text", "image")], ["down_proj"])),
        ({"expert_groups": "isolated"}, {"modalities": ["image"]},
         named([f"{LAYERS}.{i}.mlp.experts.image" for i in (0, 1)], STACKS), set()),
        ({"expert_groups": GROUPS, "num_experts": 5}, {"groups": ["words", "views"], "layers": [1]},
         named([f"{LAYERS}.1.mlp.experts.words"], STACKS), named([f"{LAYERS}.1.mlp.shared_experts.views"], LINEARS)),
        ({"expert_groups": GROUPS, "num_experts": 5, "expert_pool": [0, 0]}, {"groups": ["joint"]},
         named(["model.language_model.expert_pools.0.joint"], STACKS), set()),
        ({"expert_groups": "joint", "expert_pool": [None, 0, 0], "num_hidden_layers": 3}, {"layers": [1, 2]},
         named(["model.language_model.expert_pools.0"], STACKS), set()),
        ({"expert_pool": [0, 0]}, {"layers": [1], "groups": ["image"]}, set(),
         named([f"{LAYERS}.1.mlp.shared_experts.image"], LINEARS)),
    ],
)  # fmt: skip
def test_ours_by_layer_group_and_modality(text_config, selection, stacks, linears):
    model = make_ours(**text_config)
    config = expert_lora_config(model, **selection)
    assert set(config.target_parameters or ()) == stacks
    assert config.target_modules == linears
    assert set(changes(model, **selection)) == {*stacks, *(f"{name}.weight" for name in linears)}


@pytest.mark.parametrize("arrangement", ["hybrid", "isolated"])
def test_adapters_of_images_leave_text_as_it_is(arrangement):
    model = make_ours(expert_groups=arrangement)
    text, image = make_our_inputs(images_per_row=0), make_our_inputs()
    before = [model(**inputs).logits for inputs in (text, image)]
    model = adapted(model, image, modalities=["image"])
    assert torch.equal(model(**text).logits, before[0])
    assert (model(**image).logits - before[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "ernie4_5_vl_moe", "isolated"])
def test_only_experts_by_index_change(name):
    model = make_model(name)
    changed = changes(model, make_inputs(model, batch_size=16), experts=[0, 2], layers=[1])
    assert changed
    for stack, of_stack in changed.items():
        assert ".1." in stack
        assert set(of_stack.flatten(1).any(dim=1).nonzero().flatten().tolist()) == {0, 2}


def test_experts_in_shards_have_the_indices_of_their_group():
    config = make_config()
    config.num_expert_shards = 3
    torch.manual_seed(0)
    model = SparseMoeVlmForConditionalGeneration(config).eval()
    busy = busiest_experts(model, torch.tensor([[1, 4, 3, 2]] * 2), share=0.75)
    assert busy == {f"{LAYERS}.{i}.mlp.experts": [1, 2, 3] for i in (0, 1)}
    lora = expert_lora_config(model, experts={"layers.1.mlp.experts": [1, 2]}, r=4)
    # The first shard has two experts.
    ranks = {f"{LAYERS}.1.mlp.experts.shards.0": [0, 4], f"{LAYERS}.1.mlp.experts.shards.1": [4]}
    assert lora.expert_ranks == {f"{shard}.{stack}": of for shard, of in ranks.items() for stack in STACKS}
    assert set(lora.target_parameters) == set(lora.expert_ranks)


def test_a_bank_of_an_in_tree_model_is_a_group():
    changed = changes(make_model("ernie4_5_vl_moe"), groups=["vision_moe"], layers=[0])
    assert set(changed) == named(["model.language_model.layers.0.mlp.vision_moe.experts"], STACKS)


def test_experts_and_ranks_by_module():
    model = make_model("qwen3_moe")
    name = "model.layers.1.mlp.experts"
    by_index = expert_lora_config(model, experts={name: [3]}, r=4)
    by_rank = expert_lora_config(model, expert_ranks={"layers.1.mlp.experts": [0, 0, 0, 4, 0, 0, 0, 0]}, r=4)
    assert by_index.target_parameters == by_rank.target_parameters == [f"{name}.{stack}" for stack in STACKS]
    assert by_index.expert_ranks == by_rank.expert_ranks
    # Of one expert: A (4, 32) and B (48, 4), A (4, 24) and B (32, 4).
    assert num_adapter_parameters(get_peft_model(model, by_rank)) == 4 * (32 + 48 + 24 + 32)


@pytest.mark.parametrize(("name", "rows"), [("qwen3_moe", slice(0, 24)), ("gpt_oss", slice(0, None, 2))])
def test_gates_only(name, rows):
    changed = changes(make_model(name), projections=["gate"])
    assert len(changed) == 2
    for stack, of_stack in changed.items():
        assert stack.endswith("gate_up_proj")
        outputs = of_stack.any(dim=0).any(dim=0 if name == "gpt_oss" else 1)
        is_gate = torch.zeros(48, dtype=torch.bool)
        is_gate[rows] = True
        assert torch.equal(outputs, is_gate)


def test_experts_without_gates():
    config = NemotronHConfig(
        vocab_size=99, hidden_size=32, layers_block_type=["moe", "attention"], num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24, intermediate_size=24, pad_token_id=0, n_group=1, topk_group=1,
        initializer_range=0.2,
    )  # fmt: skip
    model = NemotronHForCausalLM(config).eval()
    config = expert_lora_config(model, projections=["up"])
    (stack,) = config.target_parameters
    assert stack.endswith("mixer.experts.up_proj")
    assert config.gate_up is None
    with pytest.raises(ValueError, match=r"some of \['up', 'down'\], which these experts have, got \['gate'\]"):
        expert_lora_config(model, projections=["gate"])


@pytest.mark.parametrize(
    ("name", "projections"),
    [("joint", "qkvo"), ("qwen3_vl_moe", "qkvo"), ("gpt_oss", "qkvo"), ("ernie4_5_vl_moe", "qkvo")],
)
def test_attention_of_the_decoder_only(name, projections):
    model = make_model(name)
    config = expert_lora_config(model, experts=[], attention=True, layers=[1])
    prefix = next(name for name, module in model.named_modules() if module is model.get_decoder())
    assert config.target_modules == {f"{prefix}.layers.1.self_attn.{x}_proj" for x in projections}
    assert config.target_parameters is None
    changed = changes(model, experts=[], attention=True, layers=[1])
    assert {name.removesuffix(".weight") for name in changed} == config.target_modules


def test_attention_of_layers_without_experts():
    config = expert_lora_config(make_ours(mlp_only_layers=[0]), experts=[], attention=True, layers=[0])
    assert config.target_modules == {f"{LAYERS}.0.self_attn.{x}_proj" for x in "qkvo"}


@pytest.mark.parametrize("name", MODELS)
def test_every_models_routers(name):
    changed = changes(make_model(name), routers=True, layers=[1])
    weights = {name.split(".1.mlp.")[1] for name in changed if name.endswith(("gate.weight", "router.weight"))}
    assert weights == {
        "aria": {"router.weight"}, "gpt_oss": {"router.weight"},
        "ernie4_5_vl_moe": {"text_moe.gate.weight", "vision_moe.gate.weight"},
    }.get(name, {"gate.weight"})  # fmt: skip


@pytest.mark.parametrize("name", ["isolated", "qwen3_moe"])
def test_routers_are_trained_saved_and_recorded_once(name, tmp_path):
    model = adapted(make_model(name), routers=True, layers=[1])
    inputs = make_inputs(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert {name.split("layers.")[1] for name in trained} == {"1.mlp.gate.modules_to_save.default.weight"}
    outputs = model(**inputs, output_router_logits=True)
    assert len(outputs.router_logits) == 2
    with model.disable_adapter():
        logits = model(**inputs, output_router_logits=True).router_logits
    assert (outputs.router_logits[1] - logits[1]).nan_to_num().abs().max() > 0.1

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(name), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, outputs.logits)


def test_the_connector_trains_in_full_beside_experts():
    connector = "model.multi_modal_projector"
    model = make_ours()
    assert expert_lora_config(model).modules_to_save is None
    assert expert_lora_config(model, connector=True).modules_to_save == [connector]
    gates = [f"{LAYERS}.{layer}.mlp.gate" for layer in range(2)]
    assert expert_lora_config(model, connector=True, routers=True).modules_to_save == [*gates, connector]
    weights = changes(model, make_our_inputs(), connector=True)
    assert {name for name in weights if "experts" not in name} == {
        f"{connector}.{layer}.{kind}" for layer in ("linear_1", "linear_2") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("routers", [True, False])
def test_biases_of_routers_count_once_and_stay_where_the_routers_do(routers, tmp_path):
    model = make_ours(router_bias_update_rate=0.25)
    inputs = make_our_inputs()
    model = get_peft_model(model, expert_lora_config(model, routers=routers))
    assert len(router_biases(model)) == 2
    update_router_bias(model, count_batch(model, inputs, model(**inputs, output_router_logits=True).router_logits))
    assert all(bool(bias.any()) == routers for bias in router_biases(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_ours(router_bias_update_rate=0.25), tmp_path)
    assert all(map(torch.equal, router_biases(again), router_biases(model)))


def test_options_are_pefts_and_run_factored():
    model = make_ours()
    config = expert_lora_config(model, r=2, lora_alpha=6, lora_dropout=0.5, use_dora=True)
    inject_adapter_in_model(config, model)  # `add_adapter` calls this
    layer = next(module for module in model.modules() if isinstance(module, FactoredExpertsLayer))
    assert (layer.r["default"], layer.scaling["default"], layer.use_dora["default"]) == (2, 3.0, True)
    inputs = make_our_inputs()
    model.train()
    torch.manual_seed(0)
    outputs = train(model, inputs).train()(**inputs).logits
    assert not torch.equal(model(**inputs).logits, outputs), "no dropout"


def test_another_adapter_has_the_same_names():
    model = get_peft_model(make_ours(), expert_lora_config(make_ours(), attention=True, routers=True))
    first = expert_lora_config(make_ours(), attention=True, routers=True)
    second = expert_lora_config(model, attention=True, routers=True)
    for name in ("target_parameters", "target_modules", "modules_to_save"):
        assert set(getattr(second, name)) == set(getattr(first, name))
    model.add_adapter("second", second)
    model.set_adapter("second")
    train(model, make_our_inputs())


@pytest.mark.parametrize("form", ["statistics", "counts", "load"])
@pytest.mark.parametrize("text_config", [{}, {"expert_groups": GROUPS, "num_experts": 5}, {"expert_pool": [0, 0]}])
def test_the_busiest_experts_of_a_modality(form, text_config):
    model = make_ours(**text_config, num_experts_per_tok=1)
    counts = measure_routing(model, [make_our_inputs(batch_size=4)])
    image = counts.wanted[:, 1]
    if form == "statistics":
        counts = routing_statistics(model.config.text_config, counts)
    elif form == "load":
        counts = {"text": counts.wanted[:, 0], "image": counts.wanted[:, 1]}
    busy = busiest_experts(model, counts, share=0.25, modality="image")
    of_places = {f"{LAYERS}.{i}.mlp.experts": image[i] for i in (0, 1)}
    if "expert_pool" in text_config:
        of_places = {"model.language_model.expert_pools.0": image.sum(dim=0)}
    if "expert_groups" in text_config:  # the first two are joint, the others do not serve images
        of_places = {f"{name}.joint": of[:2] for name, of in of_places.items()}
    assert busy.keys() == of_places.keys()
    for name, (expert, *others) in busy.items():
        assert not others
        assert of_places[name][expert] == of_places[name].max() > 0
    config = expert_lora_config(model, experts=busy)
    assert set(config.target_parameters) == named(busy, STACKS)
    assert config.target_modules == set()


def test_the_busiest_experts_of_an_in_tree_model():
    model = make_model("mixtral")
    counts = torch.zeros(2, 8)
    counts[0, [5, 1, 7]] = torch.tensor([9.0, 4.0, 2.0])
    assert busiest_experts(model, counts) == {"model.layers.0.mlp.experts": [5, 1]}
    assert busiest_experts(model, counts, share=0.6) == {"model.layers.0.mlp.experts": [5, 1, 7]}


@pytest.mark.parametrize(
    ("name", "selection", "message"),
    [
        ("isolated", {"layers": [2]}, r"`layers` names \[2\], but the model has layers 0 to 1"),
        ("dense", {"layers": [0]}, r"`layers` names \[0\], which have no experts; layers with experts are \[1\]"),
        (
            "pool",
            {"layers": [0]},
            r"layers \[0, 1\] share the experts of .*pools.0: include all of them in `layers`",
        ),
        ("isolated", {"groups": ["images"]}, r"`groups` names \['images'\], but .* are \['text', 'image'\]"),
        ("ernie4_5_vl_moe", {"groups": ["image"]}, r"groups of these layers are \['text_moe', 'vision_moe'\]"),
        ("isolated", {"modalities": ["audio"]}, r"`modalities` names \['audio'\], but the model's are \['text', 'im"),
        ("joint", {"modalities": ["image"]}, r"no group .* only \['image'\] \(joint: text, image\)"),
        ("qwen3_vl_moe", {"modalities": ["image"]}, "does not say which modalities its experts serve.*`groups`"),
        ("isolated", {"experts": [1, 4]}, r"`experts` names \[4\], but .*experts.text has experts 0 to 3"),
        ("isolated", {"experts": {"layers.2.mlp.experts": [0]}}, r"\['layers.2.mlp.experts'\] are not routed experts"),
        ("isolated", {"experts": [0], "expert_ranks": [1] * 4}, "both choose experts"),
        ("isolated", {"expert_ranks": [1, 2, 3]}, r"of .*experts.text must be 4 numbers from 0 to r = 8, got \[1, 2"),
        ("isolated", {"expert_ranks": [1, 2, 3, 9]}, "must be 4 numbers from 0 to r = 8"),
        ("isolated", {"projections": ["q"]}, r"must be some of \['gate', 'up', 'down'\], .*got \['q'\]"),
        ("isolated", {"projections": []}, "`projections` must be some of"),
        ("isolated", {"experts": []}, "nothing gets an adapter: choose some `experts`, or pass `attention=True`"),
        ("isolated", {"experts": [], "routers": True}, "nothing gets an adapter"),
        ("isolated", {"groups": []}, "`groups` is empty"),
        ("isolated", {"layers": []}, "`layers` is empty"),
        ("hybrid", {"groups": ["image"], "experts": [0]}, "always-on groups have none to choose from"),
        ("llama", {}, "LlamaForCausalLM has no experts that run through Transformers' experts interface"),
    ],
)
def test_unknown_selections_are_refused(name, selection, message):
    ours = {"dense": {"mlp_only_layers": [0]}, "pool": {"expert_pool": [0, 0]}, "hybrid": {}}
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**TEXT))
    else:
        model = make_ours(**ours[name]) if name in ours else make_model(name)
    with pytest.raises(ValueError, match=message):
        expert_lora_config(model, **selection)


def test_unknown_selections_of_busy_experts_are_refused():
    model = make_model("isolated")
    counts = {"text": torch.ones(2, 8)}
    with pytest.raises(ValueError, match=r"no tokens of modality 'image', but of \['text'\]"):
        busiest_experts(model, counts, modality="image")
    with pytest.raises(ValueError, match="`share` must be greater than 0 and at most 1, got 25"):
        busiest_experts(model, counts, share=25)
    with pytest.raises(ValueError, match="no token of modality 'text' chose any expert"):
        busiest_experts(model, {"text": torch.zeros(2, 8)}, modality="text")
    with pytest.raises(ValueError, match="has 3 layers"):
        busiest_experts(model, torch.ones(3, 8))
