"""place_experts.py prints a plan, and writes it as a device map that `from_pretrained` accepts."""

import json

import pytest
import torch

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from tests.support.models import make_inputs, make_model

TINY = "configuration/models/tiny.json"


def test_prints_a_table(run_here):
    header, _, *rows, total = run_here(
        "place_experts.py", TINY, "--max-memory", "0=80GB", "1=80GB", "--dtype", "bfloat16"
    ).splitlines()
    assert header == "| device | entries | GB | experts' GB | load of all |"
    assert [row.split(" | ")[0] for row in rows] == ["| 0", "| 1"]
    assert total.startswith("| all | ")
    assert total.endswith(" | 100.0% |")


@torch.no_grad()
def test_writes_a_map_that_loads(run_here, tmp_path):
    model, inputs = make_model(expert_groups="isolated"), make_inputs()
    model.save_pretrained(tmp_path / "model")
    routing = {"text": [[5, 5, 0, 0], [5, 5, 0, 0]], "image": [[0, 0, 1, 1], [0, 0, 1, 1]]}
    (tmp_path / "routing.json").write_text(json.dumps(routing))
    memory = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    printed = run_here(
        "place_experts.py",
        tmp_path / "model",
        *("--max-memory", f"cpu={memory // 1000 - 1}KB", "disk=1GB"),
        *("--routing", tmp_path / "routing.json", "--output", tmp_path / "map.json", "--json"),
    )
    plan = json.loads(printed)
    assert json.loads((tmp_path / "map.json").read_text()) == plan["device_map"]
    loads = {device["device"]: device["load"] for device in plan["devices"]}
    assert set(loads["disk"]) == {"text", "image"}
    assert sum(device["bytes"] for device in plan["devices"]) == memory
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map=json.loads((tmp_path / "map.json").read_text()),
        offload_folder=tmp_path / "offload",
    )
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_plans_for_models_of_the_library(run_here, tmp_path):
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "hidden_size": 64, "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = json.loads(run_here("place_experts.py", tmp_path, "--max-memory", "0=80GB", "1=80GB", "--json"))
    assert {device["device"] for device in plan["devices"]} == {0, 1}
    assert "lm_head" in plan["device_map"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "0=1KB"], "are missing"),
        (["--max-memory", "80GB"], "is not a budget such as 0=80GB"),
        (["--max-memory", "0=80GB", "--routing", "nowhere.json"], "nowhere.json"),
        (["--max-memory", "0=80GB", "--output", "nowhere/map.json"], "nowhere/map.json"),
        (["--max-memory", "0=80GB", "--dtype", "nonsense"], "`dtype` must be"),
    ],
)
def test_errors_name_the_mistake(arguments, message, run_here, capsys):
    with pytest.raises(SystemExit):
        run_here("place_experts.py", TINY, *arguments)
    assert message in capsys.readouterr().err
