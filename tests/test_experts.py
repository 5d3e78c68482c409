"""Every implementation of the experts equals the literal sum over experts, in outputs and in all gradients."""

import copy
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.experts import SparseMoeVlmExperts, SparseMoeVlmSharedExperts
from modeling_sparse_moe_vlm.routing import RoutingPlanner
from tests.support.models import make_config, make_model
from tests.support.oracles import ARRANGEMENTS, MANY_GROUPS, make_block, run_block

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
TEXT, IMAGE = 0, 1
MIXED = torch.tensor([[TEXT, IMAGE, IMAGE, IMAGE, TEXT, TEXT, IMAGE], [TEXT] * 7])


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    return request.param


@pytest.fixture
def hidden_states(device) -> torch.Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()


def place_block(device, **options):
    """Returns a block on the device and its routing planner, which accepts modality ids from any device."""
    block, config = make_block(**options)
    planner = RoutingPlanner(config)
    return block.to(device), config, lambda ids: planner(None if ids is None else ids.to(device), device)


def poison_memory(device) -> None:
    """Fills memory that the next tensors probably reuse with NaN, which rows keep if a kernel skips them."""
    for size in (24, 32, 48):
        for rows in range(1, 64):
            torch.full((rows, size), torch.nan, device=device)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


# ---------------------------------------------------------------- the literal form


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_experts_matter(name, hidden_states, device):
    """Setting any part of the block to zero changes its output. Otherwise, the comparisons below could not fail."""
    block, _, plan = place_block(device, **ARRANGEMENTS[name])
    routing = plan(MIXED)
    expected = block(hidden_states, routing)
    for parameter_name, parameter in block.named_parameters():
        silenced = copy.deepcopy(block)
        silenced.get_parameter(parameter_name).data.zero_()
        difference = (silenced(hidden_states, routing) - expected).abs().max()
        assert difference > 1e-2, parameter_name
        assert parameter.requires_grad


@pytest.mark.parametrize("ids", [MIXED, torch.ones_like(MIXED), None], ids=["mixed", "images", "text"])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_forward_and_gradients_are_the_literal_ones(name, ids, implementation, hidden_states, device):
    block, config, plan = place_block(device, implementation=implementation, **ARRANGEMENTS[name])
    direction = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    output = block(hidden_states, plan(ids))
    (output * direction.to(device)).sum().backward()

    # The literal form runs on the CPU, in float64.
    literal_input = hidden_states.detach().cpu().double().requires_grad_()
    modality_ids = torch.zeros_like(MIXED) if ids is None else ids
    literal, literal_block = run_block(block.cpu(), config, literal_input.flatten(0, 1), modality_ids.flatten())
    (literal.view(2, 7, 32) * direction.double()).sum().backward()

    torch.testing.assert_close(output.cpu(), literal.view(2, 7, 32).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden_states.grad.cpu(), literal_input.grad.float(), rtol=1e-4, atol=1e-4)
    for parameter, expected in gradients(literal_block).items():
        # In the literal loop, experts without tokens have no gradient. Here it is zero.
        actual = gradients(block)[parameter]
        expected = torch.zeros_like(actual) if expected is None else expected.float()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")


def test_always_on_experts_are_a_sum_over_experts():
    config = make_config(expert_groups=MANY_GROUPS, num_experts=None).text_config
    (_, everyone) = config.layer_expert_groups(0, always_on=True)
    shared = SparseMoeVlmSharedExperts(config, (everyone,)).requires_grad_(False)
    single = [SparseMoeVlmSharedExperts(config, (everyone,))["everyone"] for _ in range(everyone.num_experts)]
    x = torch.randn(5, 32)
    expected = torch.zeros(5, 32)
    for number, expert in enumerate(single):
        units = slice(number * 8, (number + 1) * 8)
        wide = shared["everyone"]
        expert.gate_proj.weight = torch.nn.Parameter(wide.gate_proj.weight[units])
        expert.up_proj.weight = torch.nn.Parameter(wide.up_proj.weight[units])
        expert.down_proj.weight = torch.nn.Parameter(wide.down_proj.weight[:, units])
        expected += expert(x)
    torch.testing.assert_close(shared(x, torch.zeros(5, 32)), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- sentinels and groups without tokens


@pytest.mark.parametrize("num_used", [0, 1, 3])
def test_sentinels_are_skipped_and_leave_no_nan(implementation, num_used, device):
    """Slots with the id E add nothing, whatever is in the memory that the kernel does not write for them."""
    experts = make_block(implementation=implementation, **ARRANGEMENTS["joint-by_modality"])[0].experts
    x = torch.randn(16, 32, requires_grad=True)
    index = torch.full((16, 3), experts.num_experts)
    index[:, :num_used] = torch.stack([torch.randperm(4)[:num_used] for _ in range(16)])
    weights = torch.rand(16, 3).masked_fill(index == experts.num_experts, 0.0).requires_grad_()
    expected = torch.zeros(16, 32)
    for slot in range(num_used):
        for token in range(16):
            gate, up = experts.gate_up_proj[index[token, slot]].chunk(2)
            hidden = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
            expected[token] += weights[token, slot] * (experts.down_proj[index[token, slot]] @ hidden)
    expected = expected.detach()
    experts.to(device)
    x, index, weights = (
        x.detach().to(device).requires_grad_(),
        index.to(device),
        weights.detach().to(device).requires_grad_(),
    )
    for _ in range(20):
        poison_memory(device)
        output = experts(x, index, weights)
        torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-5)
        output.square().sum().backward()
        assert all(gradient.isfinite().all() for gradient in gradients(experts).values())
        # Without any expert, there may be no path from the inputs to the output.
        if num_used > 0:
            assert x.grad.isfinite().all()
            assert weights.grad.isfinite().all()
            assert (weights.grad[:, num_used:] == 0).all()


@pytest.mark.parametrize("name", ["isolated", "many", "hybrid"])
def test_group_without_tokens_has_zero_gradients_in_training(name, implementation, hidden_states, device):
    block, _, plan = place_block(device, implementation=implementation, **ARRANGEMENTS[name])
    block.train()
    for ids in (None, torch.zeros_like(MIXED)):
        block.zero_grad()
        block(hidden_states, plan(ids)).sum().backward()
        for parameter_name, gradient in gradients(block).items():
            assert gradient is not None, parameter_name
            serves_images_alone = any(f"{group}." in parameter_name for group in ("image", "vision"))
            assert (gradient.abs().max() == 0) == serves_images_alone, parameter_name


@pytest.mark.parametrize("name", ["isolated", "many", "hybrid"])
def test_text_needs_no_image_expert_in_memory(name, implementation, hidden_states, device):
    block, _, plan = place_block(device, implementation=implementation, **ARRANGEMENTS[name])
    block.eval()
    expected = block(hidden_states, plan(None))
    for module_name, module in block.named_modules():
        if module_name.endswith((".image", ".vision")):
            module.to("meta")
    assert any(parameter.is_meta for parameter in block.parameters())
    assert torch.equal(block(hidden_states, plan(None)), expected)
    assert torch.equal(block(hidden_states, plan(torch.zeros_like(MIXED))), expected)


def test_no_group_is_left_out_among_several_processes(implementation, hidden_states, monkeypatch, device):
    """The processes gather sharded weights together, also in evaluation."""
    monkeypatch.setattr("modeling_sparse_moe_vlm.experts.is_one_of_several_processes", lambda: True)
    block, _, plan = place_block(device, implementation=implementation, **ARRANGEMENTS["many"])
    block.eval()
    block(hidden_states, plan(None)).sum().backward()
    assert all(gradient is not None for gradient in gradients(block).values())


def test_no_token_at_all(implementation, device):
    block, _, plan = place_block(device, implementation=implementation, **ARRANGEMENTS["many"])
    output = block(torch.zeros(1, 0, 32, device=device), plan(torch.zeros(1, 0, dtype=torch.long)))
    assert output.shape == (1, 0, 32)
    output.sum().backward()
    for experts in (block.experts, block.shared_experts):
        assert all(gradient is not None and not gradient.any() for gradient in gradients(experts).values())


# ---------------------------------------------------------------- independence of the batch


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_output_of_a_token_depends_only_on_the_token(name, implementation, hidden_states, device):
    block, _, plan = place_block(device, implementation=implementation, **ARRANGEMENTS[name])
    ids = torch.stack([MIXED[0], MIXED[0].flip(0)])
    x = hidden_states.detach()
    together = block(x, plan(ids))
    assert torch.equal(block(x, plan(ids)), together)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(3))
    permuted = block(x.view(1, 14, 32)[:, order], plan(ids.view(1, 14)[:, order]))
    torch.testing.assert_close(permuted[0], together.view(14, 32)[order], rtol=1e-5, atol=1e-5)
    for row in range(2):
        for position in range(7):
            cell = slice(row, row + 1), slice(position, position + 1)
            alone = block(x[cell], plan(ids[cell]))
            torch.testing.assert_close(alone, together[cell], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["many-top_p", "many-by_modality", "hybrid"])
def test_compiled_without_a_graph_break(name, implementation, hidden_states, device):
    block, _, plan = place_block(device, implementation=implementation, **ARRANGEMENTS[name])

    def run(x, ids):
        return block(x, plan(ids))

    ids = MIXED.to(device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden_states, ids), run(hidden_states, ids), rtol=1e-5, atol=1e-5)
    # Transformers 5.20 cannot compile the backward pass of its `grouped_mm` in float32.
    if implementation == "batched_mm" or hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        (expected,) = torch.autograd.grad(run(hidden_states, ids).square().sum(), hidden_states)
        (actual,) = torch.autograd.grad(compiled(hidden_states, ids).square().sum(), hidden_states)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype, implementation, device):
    """Compares outputs and gradients with those in float64."""
    experts = make_block(**ARRANGEMENTS["joint"])[0].experts
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(16)])
    x, weights = torch.randn(16, 32, generator=generator), torch.rand(16, 2, generator=generator)
    direction = torch.randn(16, 32, generator=generator)

    def run(experts, place, dtype, implementation):
        experts = copy.deepcopy(experts).to(place, dtype)
        experts.config._experts_implementation = implementation
        inputs = [tensor.to(place, dtype).requires_grad_() for tensor in (x, weights)]
        output = experts(inputs[0], index.to(place), inputs[1])
        assert output.dtype == dtype
        (output * direction.to(place, dtype)).sum().backward()
        results = {"output": output, "x": inputs[0].grad, "weights": inputs[1].grad, **gradients(experts)}
        return {name: tensor.detach().cpu().double() for name, tensor in results.items()}

    exact = run(experts, "cpu", torch.float64, "eager")
    rough = run(experts, device, dtype, implementation)
    # Five factors are rounded one after the other: inputs, two weights, an intermediate product and the output. For a
    # gradient there are two more: the gradient of the output and the product with it.
    unit = torch.finfo(dtype).eps / 2
    for name, expected in exact.items():
        bound = (5 if name == "output" else 7) * unit
        assert (rough[name] - expected).norm() / expected.norm() < bound, name


@pytest.mark.parametrize("name", ["hybrid", "many-top_p"])
def test_autocast(name, implementation, hidden_states, device):
    block, _, plan = place_block(device, implementation=implementation, **ARRANGEMENTS[name])
    with torch.autocast(device.type, torch.bfloat16):
        output = block(hidden_states, plan(MIXED))
    output.float().sum().backward()
    assert output.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(block).values())


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("names", [("joint",), ("text", "text_2"), ("text_2", "text"), ("a", "ab", "b")])
def test_saved_expert_by_expert_and_loaded_exactly(names, tmp_path):
    """The name of a group may be the start of another name."""
    groups = [{"name": name, "num_experts": 2 + number} for number, name in enumerate(names)]
    model = make_model(expert_groups=groups, num_experts=None)
    make_model(expert_groups="isolated")  # another model of the same type with other groups
    model.save_pretrained(tmp_path)

    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        keys = set(saved.keys())
    for group in groups:
        infix = f"{group['name']}." if len(groups) > 1 else ""
        for number in range(group["num_experts"]):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                assert f"model.language_model.layers.1.mlp.experts.{infix}{number}.{projection}.weight" in keys
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


def test_standalone_experts_are_a_module_like_any_other():
    config = make_config(expert_groups="joint").text_config
    experts = SparseMoeVlmExperts(config, config.layer_expert_groups(0)[0])
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "gate_up_proj": (4, 48, 32),
        "down_proj": (4, 32, 24),
    }


def test_implementation_is_a_plain_string_for_the_whole_model():
    config = make_config()
    for implementation in IMPLEMENTATIONS:
        model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
        assert model.config.text_config._experts_implementation == implementation


# ---------------------------------------------------------------- widths that kernels cannot take


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [37, 12])
def test_experts_of_any_width_run_by_default(width, dtype):
    """Kernels of grouped products need rows of a multiple of 16 bytes, so other experts run one by one."""
    model = make_model(moe_intermediate_size=width).to(dtype)
    assert model.config.text_config._experts_implementation == "eager"
    input_ids = torch.arange(4, 12)[None]
    assert model(input_ids=input_ids).logits.isfinite().all()
    assert make_model().config.text_config._experts_implementation == "grouped_mm"


def test_grouped_products_of_odd_widths_are_refused():
    groups = [
        {"name": "joint", "num_experts": 4},
        {"name": "text", "num_experts": 2, "intermediate_size": 18},
        {"name": "everyone", "num_experts": 1, "intermediate_size": 9, "always_on": True},
    ]
    model = make_model(expert_groups=groups, num_experts=None)
    message = 'which {"expert_groups[\'text\'].intermediate_size": 18} are not: use "eager"'
    with pytest.raises(ValueError, match=re.escape(message)):
        model.set_experts_implementation("grouped_mm")
    model.set_experts_implementation("batched_mm")
    config = make_config(hidden_size=38, num_attention_heads=1, num_key_value_heads=1)
    config._experts_implementation = "grouped_mm"
    with pytest.raises(ValueError, match=re.escape("{'hidden_size': 38}")):
        SparseMoeVlmForConditionalGeneration(config)
