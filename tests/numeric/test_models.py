"""
Whole models on the device that `--device` names against the same models on the CPU: outputs, read-out, steering,
generation, compiling, training, device maps, shards, and models that were just upcycled.
"""

import copy

import pytest
import torch
from transformers import CompileConfig, Trainer, TrainingArguments

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.modality_weights import modality_weights
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.integration.test_trainer import make_rows
from tests.support import in_tree_models, upcycled
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_inputs, make_model

READ = {"output_modality_weights": True}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
LEARNED = {"learned_modality_priors": True}
# In half precision every token uses every expert: otherwise rounding could change which experts a token chooses.
ALL_EXPERTS = {"num_experts_per_tok": 4, "expert_groups": "joint"}


def place(inputs: dict[str, torch.Tensor], device, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.detach().cpu().double() - expected).norm() / expected.norm()).item()


def close(actual: torch.Tensor, expected: torch.Tensor, **tolerances) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected.detach(), **{"rtol": 1e-4, "atol": 1e-4} | tolerances)


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("steering", [{}, {"modality_guidance": 0.5}, {"modality_priors": {"image": 4.0}}])
@torch.no_grad()
def test_outputs(arrangement, attention, steering, device):
    """Logits, read-out and steering of rows with an image, one of them padded."""
    model, inputs = make_model(expert_groups=arrangement, **LEARNED), make_inputs()
    inputs["attention_mask"][1, :1] = 0
    model.set_attn_implementation({"text_config": "eager"})
    expected = model(**inputs, **READ, **steering)
    model = model.to(device)
    model.set_attn_implementation({"text_config": attention})
    outputs = model(**place(inputs, device), **READ, **steering)
    real = inputs["attention_mask"].bool()
    close(outputs.logits.cpu()[real], expected.logits[real])
    for name in ("modality_weights", "count_free_modality_weights"):
        for ours, theirs in zip(outputs[name], expected[name], strict=True):
            close(ours.cpu().transpose(1, 2)[real], theirs.transpose(1, 2)[real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype, device):
    """Logits and gradients, against float64 with the same rounded weights."""
    model, inputs = make_model(**ALL_EXPERTS), make_inputs()

    def run(model, inputs):
        logits = model(**inputs).logits
        logits.float().square().mean().backward()
        return {"logits": logits} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    reference = copy.deepcopy(model).to(dtype).double()
    reference.set_experts_implementation("eager")  # grouped products take no float64
    exact = run(reference, place(place(inputs, "cpu", dtype), "cpu", torch.float64))
    rough = run(model.to(device, dtype), place(inputs, device, dtype))
    assert rough["logits"].dtype == dtype
    bound = 3 * torch.finfo(dtype).eps
    assert difference(rough["logits"], exact["logits"].detach().double()) < bound
    for name in ("lm_head.weight", "model.language_model.layers.1.mlp.experts.down_proj"):
        assert difference(rough[name], exact[name].double()) < 2 * bound, name


def test_gradients(arrangement, device):
    """Of the language loss and of the router losses."""
    model, inputs = (
        make_model(expert_groups=arrangement, router_aux_loss_coef=0.1, router_z_loss_coef=0.1),
        make_inputs(),
    )
    model.train()
    gradients = []
    for where in ("cpu", device):
        model = copy.deepcopy(model).to(where)
        model.zero_grad()
        given = place(inputs, where)
        model(**given, labels=given["input_ids"], output_router_logits=True).loss.backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    expected, actual = gradients
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        close(actual[name], gradient, atol=1e-4 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "qwen3_vl_moe"])
@torch.no_grad()
def test_read_out_of_models_of_transformers(name, device):
    model, inputs = in_tree_models.make_model(name), in_tree_models.make_inputs(name)
    with modality_weights(model) as expected:
        logits = model(**inputs).logits
    model = model.to(device)
    with modality_weights(model) as weights:
        outputs = model(**place(inputs, device)).logits
    real = inputs["attention_mask"].bool()
    close(outputs.cpu()[real], logits[real])
    close(weights.of("image"), expected.of("image"), rtol=1e-3, equal_nan=True)


# ---------------------------------------------------------------- generation and compiling


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
def test_greedy_generation(arrangement, cache, device):
    """The tokens and, within rounding, the scores of the CPU."""
    if cache == "offloaded" and device.type == "cpu":
        pytest.skip("moves the cache between an accelerator and the CPU")
    model, inputs = make_model(expert_groups=arrangement), make_inputs()
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "disable_compile": True}
    expected = model.generate(**inputs, **options)
    outputs = model.to(device).generate(**place(inputs, device), **options, cache_implementation=cache)
    assert torch.equal(outputs.sequences.cpu(), expected.sequences)
    for ours, theirs in zip(outputs.scores, expected.scores, strict=True):
        close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_compiled_decoding_with_a_static_cache(device):
    """By Inductor on a GPU, as `generate` does by itself there."""
    model, inputs = make_model(), make_inputs()
    expected = model.generate(**inputs, **GREEDY)
    compile_config = CompileConfig(fullgraph=True, mode=None, backend=backend_of(device))
    compile_config._compile_all_devices = True
    options = GREEDY | {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.to(device).generate(**place(inputs, device), **options).cpu(), expected)


def backend_of(device) -> str:
    """The compiler's backend; on the CPU one that needs no C++ compiler and little time."""
    return "aot_eager" if device.type == "cpu" else "inductor"


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@torch.no_grad()
def test_compiled_forward(experts, device):
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs, **READ)
    model = model.to(device)
    model.set_experts_implementation(experts)
    compiled = torch.compile(model, fullgraph=True, backend=backend_of(device))
    outputs = compiled(**place(inputs, device), **READ)
    close(outputs.logits, expected.logits)
    close(outputs.modality_weights[1], expected.modality_weights[1])


# ---------------------------------------------------------------- training


def test_trainer_steps_in_bfloat16(tmp_path, device):
    """The losses of three steps are those of float32 on the CPU within bfloat16's rounding."""
    losses = []
    for use_cpu, bf16 in ((True, False), (device.type == "cpu", True)):
        model = make_model(**ALL_EXPERTS, router_aux_loss_coef=0.01)
        options = {"output_dir": str(tmp_path), "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
        options |= QUIET_TRAINING | {
            "use_cpu": use_cpu,
            "bf16": bf16,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
        }
        arguments = TrainingArguments(**options)
        arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs would split the batch
        trainer = Trainer(model, arguments, train_dataset=make_rows(), data_collator=collate)
        trainer.train()
        assert next(trainer.model.parameters()).device.type == ("cpu" if use_cpu else device.type)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    exact, rough = losses
    assert len(exact) == 3
    assert exact[2] < 0.9 * exact[0], "it learns"
    assert rough == pytest.approx(exact, rel=2e-2)


# ---------------------------------------------------------------- over what is there


def devices_here(device) -> list[str]:
    """The device, its siblings, the CPU and the disk."""
    siblings = (
        [f"{device.type}:{index}" for index in range(torch.accelerator.device_count())] if device.type != "cpu" else []
    )
    return [*siblings, "cpu", "disk"]


@pytest.mark.parametrize("num_shards", [1, 2])
@torch.no_grad()
def test_experts_over_all_places(arrangement, num_shards, device, tmp_path):
    """Experts, or shards of them, in all places in turn, and everything else on the device."""
    model, inputs = make_model(expert_groups=arrangement), make_inputs()
    expected, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    config.num_expert_shards = num_shards
    with torch.device("meta"):
        skeleton = SparseMoeVlmForConditionalGeneration(config)
    inside = [name for name, module in skeleton.named_modules() if has_stacks(module)]
    places = devices_here(device)
    device_map = {name: places[number % len(places)] for number, name in enumerate(inside)}
    assert set(device_map.values()) == set(places)
    for name, _ in skeleton.named_modules():
        is_apart = not any(f"{other}.".startswith(f"{name}." if name else "") for other in inside)
        if is_apart and not any(f"{name}.".startswith(f"{other}.") for other in device_map):
            device_map[name] = str(device)
    loaded = type(model).from_pretrained(
        tmp_path, num_expert_shards=num_shards, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    given = place(inputs, device)
    close(loaded(**given).logits, expected)
    assert torch.equal(loaded.generate(**given, **GREEDY).cpu(), tokens)


def has_stacks(module) -> bool:
    """Whether a module has stacks of routed experts itself."""
    return "down_proj" in module._parameters and module._parameters["down_proj"].dim() == 3


# ---------------------------------------------------------------- upcycling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("start", ["copy", "split", "residual"])
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_upcycled_models_start_where_the_dense_one_is(kind, start, dtype, device):
    dense = upcycled.make_dense(kind).to(device, dtype)
    inputs = place(upcycled.make_dense_inputs(kind), device, dtype)
    expected = dense(**inputs).logits
    fields = {"copy": {}, "split": {"granularity": 2}, "residual": {}}[start]
    groups = "hybrid" if start == "residual" else "isolated"
    model = upcycle(dense, groups, start=start, num_experts=4, num_experts_per_tok=2, **fields).eval()
    assert model.device == device
    assert next(model.parameters()).dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert difference(model(**inputs).logits, expected.cpu().double()) < bound
