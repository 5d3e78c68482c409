"""modality_ablation.py with an untrained model: the form of its report."""

import sys

import pandas as pd
import pytest

from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.training import from_scratch
from tests.scripts.conftest import SCRIPTS

PRESET = SCRIPTS.parent / "configuration/models/tiny.json"


@pytest.fixture
def benchmark(load_benchmark, monkeypatch):
    module = load_benchmark("modality_ablation")
    monkeypatch.setattr(module, "BOOTSTRAP_SAMPLES", 10)
    return module


def test_report(benchmark, load_gpu, monkeypatch, capsys, tmp_path):
    for part in from_scratch(str(PRESET), scenes("train", 50, cell_size=16), vocab_size=512):
        part.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--json", "--quick", "--examples", "8", "--steered", "2"]
    monkeypatch.setattr(sys, "argv", ["modality_ablation.py", *arguments])
    benchmark.main()

    result = load_gpu().read_result(capsys.readouterr().out)
    assert result.keys() == {"benchmark", "device", "versions", "rows", "holds", "steering"}
    rows = {(row["metric"], row["case"]): row for row in result["rows"]}
    for ablation in benchmark.ABLATIONS:
        for metric in ("spearman_alpha", "spearman_count_free"):
            row = rows[metric, f"{ablation} image, all objects"]
            assert row["examples"] == 8
            assert -1 <= row["ours"] <= 1
            assert row["low"] <= row["high"]
    assert result["steering"][0] == {"steering": "none", "original": 0.0, "same": 100.0}


def test_a_single_scene_has_no_correlation(benchmark):
    rho, low, high = benchmark.spearman(pd.Series([1.0]), pd.Series([2.0]))
    row = {"ablation": "blank", "weight": "alpha", "objects": 1, "examples": 1, "mean_loss": 0.5}
    comparison = benchmark.as_comparison(row | {"rho": rho, "low": low, "high": high})
    assert (comparison["ours"], comparison["low"], comparison["high"]) == (None, None, None)
    assert comparison["case"] == "blank image, 1 objects"


def test_without_the_demo(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modality_ablation.py"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "there is no outputs/demo/model yet: run `make demo`" in capsys.readouterr().err


def test_quick_without_the_demo(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modality_ablation.py", "--quick", "--examples", "5", "--device", "cpu"])
    arguments = benchmark.parse_arguments()
    assert (arguments.model, arguments.examples, arguments.steered) == (None, 5, 2)
    assert "the model is a random one" in capsys.readouterr().err
    model, processor = benchmark.load(None)
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
