"""`torch.export` of upcycled models: the program gives the outputs of the model for other lengths and layouts too."""

import pytest
import torch
from torch.export import Dim

from tests.support.upcycled import make_dense, make_few_experts, make_inputs

pytestmark = pytest.mark.newest

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
TOKENS = ("input_ids", "mm_token_type_ids")


def make_exportable(kind: str, is_dense: bool = False):
    if is_dense:
        model = make_dense(kind)
    else:
        model = make_few_experts(kind, modalities=["text", "image"])
        model.set_experts_implementation("grouped_mm")
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    return model


def inputs_of(kind: str, images: bool) -> dict[str, torch.Tensor]:
    inputs = make_inputs(kind, padded=False, images=images)
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def export(model, inputs: dict[str, torch.Tensor], strict: bool, dynamic: tuple[int, ...]):
    """Exports a model for any size of the given dimensions: 0 for the rows and images, 1 for the length of rows."""
    sizes = (Dim("batch", min=1, max=64), Dim("length", min=7, max=128))
    shapes = {name: {d: sizes[d] for d in dynamic if name in TOKENS or d == 0} or None for name in inputs}
    return torch.export.export(model, args=(), kwargs=inputs, dynamic_shapes=shapes, strict=strict).module()


def lengthened(inputs: dict[str, torch.Tensor], batch_size: int, extra: int) -> dict[str, torch.Tensor]:
    """Returns inputs with the images at other positions, and with other numbers of rows and of text tokens."""
    changed = {name: inputs[name].roll(3, dims=1) for name in TOKENS if name in inputs}
    for name, tokens in changed.items():
        text = torch.arange(20, 20 + extra) if name == "input_ids" else torch.zeros(extra, dtype=torch.long)
        tokens = torch.cat([tokens, text.expand(len(tokens), -1)], dim=1)
        changed[name] = tokens.repeat(2, 1)[:batch_size]
    return inputs | changed


@pytest.mark.parametrize(
    ("kind", "images", "dynamic", "strict"),
    [
        ("llama", True, (0, 1), False),  # with tokens that `mm_token_type_ids` assigns to images
        pytest.param("llama", True, (0, 1), True, marks=pytest.mark.extensive),
        pytest.param("llava", True, (1,), False, marks=pytest.mark.extensive),
        pytest.param("qwen3_vl", False, (0, 1), False, marks=pytest.mark.extensive),
        pytest.param("qwen3_vl", False, (0, 1), True, marks=pytest.mark.extensive),
    ],
)
def test_the_program_gives_the_outputs_of_the_model(kind, images, dynamic, strict):
    model, inputs = make_exportable(kind), inputs_of(kind, images)
    program = export(model, inputs, strict, dynamic)
    for batch_size, extra in ((2, 0), (2, 5), (3, 17), (1, 40)):
        given = lengthened(inputs, batch_size if 0 in dynamic else 2, extra)
        with torch.no_grad():
            expected = model(**given).logits
            torch.testing.assert_close(program(**given).logits, expected, **TOLERANCE)
    if images:
        text = {name: value for name, value in given.items() if name != "mm_token_type_ids"}
        shuffled = text | {"input_ids": given["input_ids"].roll(1, dims=1)}
        shuffled |= {"mm_token_type_ids": given["mm_token_type_ids"] * 0} if "mm_token_type_ids" in given else {}
        with torch.no_grad():
            assert not torch.allclose(program(**shuffled).logits, expected, **TOLERANCE)


@pytest.mark.extensive
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "upcycled"])
@pytest.mark.parametrize(
    ("kind", "dynamic", "strict", "message"),
    [
        ("llava", (), True, "Unsupported context manager"),
        ("llava", (0,), False, r"Constraints violated \(batch\)"),
        ("qwen3_vl", (), False, "Could not guard on data-dependent expression"),
    ],
)
def test_limits_of_the_base_models(kind, dynamic, strict, message, is_dense):
    """What cannot be exported from an upcycled model cannot be exported from the dense model either."""
    inputs = inputs_of(kind, images=True)
    with pytest.raises(Exception, match=message):
        export(make_exportable(kind, is_dense), inputs, strict, dynamic)
