"""quantization.py with an untrained model: the form of its report, and sizes that can be computed by hand."""

import sys

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.training import from_scratch
from tests.scripts.conftest import SCRIPTS
from tests.support.models import make_model

PRESET = SCRIPTS.parent / "configuration/models/tiny.json"


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("quantization")


@pytest.mark.extensive
def test_report(benchmark, load_gpu, monkeypatch, capsys, tmp_path):
    pytest.importorskip("optimum.quanto")
    monkeypatch.setattr(benchmark, "is_installed", lambda name: name == "optimum.quanto")
    model, processor = from_scratch(str(PRESET), scenes("train", 50, cell_size=16), vocab_size=512)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--json", "--quick", "--examples", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["quantization.py", *arguments])
    benchmark.main()
    rows = {(row["case"], row["metric"]): row for row in load_gpu().read_result(capsys.readouterr().out)["rows"]}
    cases = {f"quanto {bits} bits, {kind}" for bits in (8, 4) for kind in ("stacked", "unfused")}
    metrics = {"bytes", "expert_bytes", "exact_match", "same_answers"}
    assert rows.keys() == {(case, metric) for case in cases for metric in metrics}
    stacks = [name for name, _ in model.named_parameters() if ".mlp.experts." in name]
    experts = 4 * sum(model.get_parameter(name).numel() for name in stacks)
    assert {rows[case, "expert_bytes"]["peer"] for case in cases} == {experts}
    everything = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    assert {rows[case, "bytes"]["peer"] for case in cases} == {everything}
    for bits, low, high in ((8, 0.25, 0.27), (4, 0.125, 0.16)):
        assert rows[f"quanto {bits} bits, stacked", "expert_bytes"]["ratio"] == 1
        assert low < rows[f"quanto {bits} bits, unfused", "expert_bytes"]["ratio"] < high
        stacked, unfused = (rows[f"quanto {bits} bits, {kind}", "bytes"]["ours"] for kind in ("stacked", "unfused"))
        experts_of_unfused = rows[f"quanto {bits} bits, unfused", "expert_bytes"]["ours"]
        assert unfused - experts_of_unfused == stacked - experts, "the rest is the same"


def test_sizes(benchmark):
    model = make_model(num_hidden_layers=3, expert_pool=[0, None, 0])
    experts = 2 * 4 * 3 * 24 * 32  # of the pool and of one layer; always-on experts do not count
    assert benchmark.size_of(model, experts=True) == 4 * experts
    assert benchmark.size_of(model.half()) == sum(
        tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    )
    state = type("State", (), {"absmax": torch.zeros(3)})()
    packed = torch.zeros(10, dtype=torch.uint8)
    packed.quant_state = state
    assert benchmark.num_bytes(packed) == 10 + 12


def test_without_the_demo_or_a_quantiser(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quantization.py"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "there is no outputs/demo/model yet: run `make demo`" in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "is_installed", lambda name: False)
    with pytest.raises(SystemExit, match="no quantiser is installed: pip install bitsandbytes torchao"):
        list(benchmark.cases())
