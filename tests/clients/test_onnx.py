"""Models exported to ONNX by Transformers give the same logits in ONNX Runtime, also for other shapes and layouts."""

import pytest
import torch

from tests.support import upcycled
from tests.support.models import make_inputs, make_model

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def rolled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns inputs with the images at other positions."""
    tokens = {key: inputs[key].roll(3, dims=1) for key in ("input_ids", "mm_token_type_ids") if key in inputs}
    return inputs | tokens


def check_export(model, inputs, others, experts: str | None = "grouped_mm") -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    if experts is not None:
        model.set_experts_implementation(experts)
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    exported = OnnxExporter().export(model, dict(inputs), config=OnnxConfig(dynamic=True))
    logits = []
    for given in (inputs, *others):
        with torch.no_grad():
            logits.append(model(**given).logits)
        torch.testing.assert_close(torch.as_tensor(exported(**given)["logits"]), logits[-1], **TOLERANCE)
    assert not any(first.shape == logits[0].shape and first.allclose(logits[0]) for first in logits[1:])


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_our_models_with_images(experts):
    other = rolled(make_inputs(seed=1, batch_size=3, length=17))
    check_export(make_model(), make_inputs(), [rolled(make_inputs(seed=1)), other], experts)


def test_our_models_with_text_only():
    other = make_inputs(seed=1, images_per_row=0, batch_size=3, length=9)
    check_export(make_model(), make_inputs(images_per_row=0), [other])


def test_upcycled_models():
    inputs = upcycled.make_inputs("llava", padded=False)
    check_export(upcycled.make_upcycled("llava"), inputs, [rolled(inputs)])


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "upcycled"])
def test_images_of_qwen3_vl_cannot_be_exported_from_the_dense_model_either(is_dense):
    model = upcycled.make_dense("qwen3_vl") if is_dense else upcycled.make_upcycled("qwen3_vl")
    with pytest.raises(Exception, match="Could not guard on data-dependent expression"):
        check_export(model, upcycled.make_inputs("qwen3_vl", padded=False), [], None if is_dense else "grouped_mm")


def test_the_loop_over_experts_cannot_be_exported():
    model = make_model()
    with pytest.raises(Exception, match="data-dependent"):
        check_export(model, make_inputs(), [], "eager")
