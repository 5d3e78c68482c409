"""`torch.compile` without graph breaks and `torch.export` give the outputs of the model."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.token_modalities import padding_mask
from tests.support.models import TEXT_CONFIG, make_inputs, make_model

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
ARRANGEMENTS = {
    "hybrid": {},
    "joint": {"expert_groups": "joint"},
    "isolated": {"expert_groups": "isolated"},
    "top_p": {"router": "top_p", "num_experts_per_tok": 3},
    "by_modality": {"num_experts_per_tok_by_modality": {"text": 1, "image": 3}},
    "bias": {"router": "sigmoid", "router_bias_update_rate": 1e-3},
    "capacity": {"expert_capacity_factor": 1.0, "router_global_entropy_coef": 0.1},
}


# Tracing takes seconds each.
MARKS = {"hybrid": [], "isolated": [pytest.mark.newest]}
TRACED = [pytest.param(name, marks=MARKS.get(name, [pytest.mark.extensive])) for name in ARRANGEMENTS]


@pytest.fixture(params=TRACED)
def text_config(request) -> dict:
    return ARRANGEMENTS[request.param]


def make(text_config: dict, experts: str = "grouped_mm", attention: str = "sdpa"):
    model = make_model(**text_config)
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    return model


def without_mask(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in inputs.items() if key != "attention_mask"}


# ------------------------------------------------------------------------------------------------ compile


@pytest.mark.parametrize(
    ("text_config", "images_per_row"),
    [
        ("hybrid", 0),
        ("hybrid", 1),
        ("isolated", 1),
        *(pytest.param(name, 1, marks=pytest.mark.extensive) for name in ARRANGEMENTS if name not in MARKS),
    ],
    indirect=["text_config"],
)
def test_compiled_forward(text_config, images_per_row):
    """One graph, also if modality ids are derived from the token ids, and wherever the images are."""
    model = make(text_config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = make_inputs(images_per_row=images_per_row)
    derived = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    other = make_inputs(seed=1, images_per_row=images_per_row)
    for key in ("input_ids", "mm_token_type_ids"):
        other[key] = other[key].roll(3, dims=1)
    with torch.no_grad():
        for given in (inputs, derived, other):
            torch.testing.assert_close(compiled(**given).logits, model(**given).logits, **TOLERANCE)


@pytest.mark.extensive
@pytest.mark.slow
@pytest.mark.parametrize("text_config", ["hybrid"], indirect=True)
def test_forward_compiled_by_inductor(text_config):
    model, inputs = make(text_config), make_inputs()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **TOLERANCE)


def test_compiled_training_step(text_config):
    # In older releases, the backward pass of the fallback for grouped products on the CPU does not compile.
    experts = "grouped_mm" if Version(transformers.__version__) >= Version("5.23") else "batched_mm"
    model = make(text_config | {"router_aux_loss_coef": 0.1}, experts).train()
    compiled = copy.deepcopy(model)
    inputs = make_inputs()
    losses = []
    for run in (model, torch.compile(compiled, fullgraph=True, backend="aot_eager")):
        loss = run(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    expected = dict(model.named_parameters())
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, **TOLERANCE, msg=name)


@pytest.mark.parametrize("marked", ["tokens", "positions"])
def test_compiled_forward_where_only_one_batch_size_is_symbolic(marked):
    """The compiler chooses which sizes are symbolic from earlier calls, so tokens and positions can differ."""
    model = make(ARRANGEMENTS["hybrid"])
    inputs = {"input_ids": make_inputs(images_per_row=0)["input_ids"]}
    tokens = inputs["input_ids"]
    position_ids = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    position_ids[:, -2:] = -1  # padding of packed rows
    expected = model(**inputs, position_ids=position_ids, use_cache=False).logits
    torch._dynamo.maybe_mark_dynamic(tokens if marked == "tokens" else position_ids, 0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(**inputs, position_ids=position_ids, use_cache=False).logits, expected, **TOLERANCE
    )


@pytest.mark.parametrize("marked", ["tokens", "positions"])
def test_compiled_padding_mask_where_only_one_batch_size_is_symbolic(marked):
    positions = torch.tensor([[0, 1, -1], [0, 1, 2]])
    tokens = torch.zeros(2, 3)
    torch._dynamo.maybe_mark_dynamic(tokens if marked == "tokens" else positions, 0)
    compiled = torch.compile(lambda x, ids: padding_mask(None, ids, x.shape), fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens, positions), positions >= 0)


def test_compiled_forward_checks_the_number_of_image_tokens():
    model = make({})
    inputs = make_inputs()
    inputs["input_ids"][0, 2] = 50
    inputs.pop("mm_token_type_ids")
    with (
        torch.no_grad(),
        pytest.raises((ValueError, RuntimeError), match=r"Image features and image tokens|Runtime assertion failed"),
    ):
        torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)


# ------------------------------------------------------------------------------------------------ export

EXPORTED = pytest.mark.parametrize(
    ("text_config", "experts"),
    [("hybrid", "batched_mm"), *(pytest.param(*param.values, "grouped_mm", marks=param.marks) for param in TRACED)],
    indirect=["text_config"],
)


@EXPORTED
def test_exported_text_model(text_config, experts):
    torch.manual_seed(0)
    model = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | text_config)).eval()
    model.set_experts_implementation(experts)
    model.config.use_cache = False
    inputs = {"input_ids": make_inputs(images_per_row=0)["input_ids"]}
    exported = torch.export.export(model, args=(), kwargs=inputs, strict=False)
    other = {"input_ids": inputs["input_ids"].flip(0)}
    with torch.no_grad():
        for given in (inputs, other):
            torch.testing.assert_close(exported.module()(**given).logits, model(**given).logits, **TOLERANCE)


@EXPORTED
def test_exported_model(text_config, experts):
    model = make(text_config, experts)
    model.config.text_config.use_cache = False
    inputs = make_inputs()
    exported = torch.export.export(model, args=(), kwargs=inputs, strict=False)
    # The same shapes with the image at another position: the layout must not be a constant of the program.
    other = make_inputs(seed=1)
    for key in ("input_ids", "mm_token_type_ids"):
        other[key] = other[key].roll(3, dims=1)
    with torch.no_grad():
        for given in (inputs, other):
            torch.testing.assert_close(exported.module()(**given).logits, model(**given).logits, **TOLERANCE)


def test_exported_model_with_any_batch_and_length():
    model = make({})
    model.config.text_config.use_cache = False
    inputs = without_mask(make_inputs())
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=7, max=128)
    tokens = {0: batch, 1: length}
    shapes = {"input_ids": tokens, "mm_token_type_ids": tokens, "pixel_values": {0: batch}}
    exported = torch.export.export(model, args=(), kwargs=inputs, dynamic_shapes=shapes, strict=False)
    for batch_size, size in ((2, 14), (5, 31), (1, 9)):
        given = without_mask(make_inputs(batch_size=batch_size, length=size))
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(**given).logits, model(**given).logits, **TOLERANCE)
