"""`accelerate estimate-memory`, and quantised models with a device map."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import estimate
from transformers import AutoModelForImageTextToText, QuantoConfig

from tests.support import upcycled
from tests.support.models import make_inputs, make_model

pytestmark = pytest.mark.newest

MODELS = {"ours": (make_model, make_inputs), "upcycled": (upcycled.make_upcycled, upcycled.make_inputs)}


@pytest.mark.parametrize("kind", MODELS)
def test_estimate_memory(kind, monkeypatch, capsys, tmp_path):
    model = MODELS[kind][0]()
    model.save_pretrained(tmp_path)
    # The command asks the Hub, which returns the contents of config.json, and then loads by the same name.
    config = json.loads((tmp_path / "config.json").read_text())
    info = SimpleNamespace(config=config, library_name="transformers")
    monkeypatch.setattr(estimate, "verify_on_hub", lambda name, token: info)
    arguments = [str(tmp_path), "--trust_remote_code", "--dtypes", "float32", "float16"]
    rows = estimate.gather_data(estimate.estimate_command_parser().parse_args(arguments))
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert [row[0] for row in rows] == ["float32", "float16"]
    for (_, _, total, _), size in zip(rows, (num_bytes, num_bytes / 2), strict=True):
        assert size <= total <= size + buffers
    estimate.estimate_command(estimate.estimate_command_parser().parse_args(arguments))
    assert "Memory Usage for loading" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [pytest.param("ours", marks=pytest.mark.extensive), "upcycled"])
def test_quantised_models_with_a_device_map(kind, tmp_path):
    pytest.importorskip("optimum.quanto")
    make, inputs = MODELS[kind]
    make().save_pretrained(tmp_path)
    logits = []
    for device_map in (None, "cpu", "auto", {"": "cpu"}):
        quantised = AutoModelForImageTextToText.from_pretrained(
            tmp_path,
            trust_remote_code=True,
            quantization_config=QuantoConfig(weights="int8"),
            unfused_experts=True,
            device_map=device_map,
        )
        with torch.no_grad():
            logits.append(quantised(**inputs()).logits)
    for other in logits[1:]:
        assert torch.equal(other, logits[0])
