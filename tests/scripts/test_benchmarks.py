"""The benchmarks: how they measure, and the form of what they report."""

import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from tests.scripts.conftest import SCRIPTS

# Other benchmarks have their own tests.
SPEED = ("throughput", "attention_readout", "moe_layer", "expert_lora", "expert_pools", "packing")


@pytest.fixture
def harness(load_benchmark):
    return load_benchmark("harness")


def test_ratios_and_bars(harness):
    row = harness.Row("case", "metric", ours=3.0, peer=2.0, bar=1.5)
    assert row.as_dict() == {
        "case": "case",
        "metric": "metric",
        "ours": 3.0,
        "peer": 2.0,
        "ratio": 1.5,
        "bar": 1.5,
        "holds": True,
    }
    assert not harness.Row("case", "metric", 3.0, 2.0, bar=1.4).holds
    assert harness.Row("case", "metric", 3.0, 2.0).holds
    nothing = harness.Row("case", "metric", 3.0, 0, bar=1.0)
    assert (nothing.ratio, nothing.holds) == (None, False)


def test_runs_take_turns(harness, monkeypatch):
    order = []
    seconds = {"a": iter([9, 9, 1, 5, 2]), "b": iter([9, 9, 4, 4, 7])}  # the first two are warm-up

    def take(run, device):
        assert device == "cpu"
        order.append(run)
        return next(seconds[run])

    monkeypatch.setattr(harness, "seconds_of", take)
    assert harness.time_interleaved({"a": "a", "b": "b"}, "cpu", 3) == {"a": 2, "b": 4}
    assert [set(order[i : i + 2]) for i in range(0, 10, 2)] == [{"a", "b"}] * 5
    assert order != ["a", "b"] * 5


def test_seconds_on_a_gpu_are_between_events(harness, monkeypatch):
    """In milliseconds, and only after the work before and all of the run are done."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append(self)

        def elapsed_time(self, end):
            assert log == ["wait", self, "run", end, "wait"]
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(log.clear() if device == "cuda:0" else None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("wait"))
    log.append("not cleared by the choice of the GPU")
    assert harness.seconds_of(lambda: log.append("run"), "cuda:0") == 0.25


def test_peak_memory_on_a_gpu_is_that_of_the_run(harness, monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: len(log))
    assert harness.peak_memory(lambda: log.append("run"), "cuda") == 4
    assert log == ["wait", "reset", "run", "wait"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_on_the_cpu(harness):
    idle = harness.peak_memory(lambda: None, "cpu")
    assert harness.peak_memory(lambda: torch.ones(1 << 24), "cpu") - idle == pytest.approx(1 << 26, rel=0.2)


@pytest.mark.parametrize(
    ("device", "message"),
    [("nowhere", "nowhere"), ("meta", "only cpu and cuda"), ("cuda:99", "finds no such GPU")],
)
def test_a_device_that_cannot_be_measured(harness, device, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", device])
    with pytest.raises(SystemExit) as stopped:
        harness.parse_arguments("A benchmark")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--quick"]])
def test_few_repetitions(harness, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    assert harness.parse_arguments("A benchmark").repetitions == (7 if arguments else 15)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--repetitions", "6"])
    with pytest.raises(SystemExit):
        harness.parse_arguments("A benchmark")
    assert "at least 7" in capsys.readouterr().err


@pytest.mark.parametrize("name", SPEED)
def test_report_of(name, load_benchmark, load_gpu, monkeypatch, capsys):
    """Every benchmark, with small sizes: its last line has the form that all share."""
    module = load_benchmark(name)
    if hasattr(module, "time_interleaved"):
        once = module.time_interleaved
        monkeypatch.setattr(module, "time_interleaved", lambda runs, device, _: once(runs, device, 1))
    if name == "expert_lora":
        monkeypatch.setattr(module, "memory_in_process", _memory_here(module))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--json", "--device", "cpu"])
    module.main()
    result = load_gpu().read_result(capsys.readouterr().out)
    assert result["benchmark"] == name
    assert " CPU, " in result["device"]
    assert {"torch", "transformers", "accelerate", "peft"} <= result["versions"].keys()
    assert METRICS[name] == {row["metric"] for row in result["rows"]}


METRICS = {
    "throughput": {
        f"{phase}_vs_{peer}"
        for phase in ("prefill", "decode", "train_step")
        for peer in ("qwen3_vl_moe", "dense_floor")
    },
    "attention_readout": {
        "forward_with_readout",
        "train_step_with_priors",
        "decode_with_readout",
        "guidance",
        "generate_with_readout",
    },
    "expert_lora": {
        "decode_vs_adapter_free",
        "decode_vs_peft",
        "train_step_vs_adapter_free",
        "train_step_vs_frozen",
        "train_step_vs_peft",
        "forward_vs_peft",
        "extra_memory_vs_peft",
        "forward_extra_memory_vs_peft",
    },
    "moe_layer": {"forward_vs_best", "train_step_vs_best"},
    "expert_pools": {"validation_loss"},
    "packing": {"padded_vs_packed", "tokens_per_second"},
}


def _memory_here(module):
    def measure(variant, arguments):
        arguments.memory_of = variant
        return module.measure_memory(arguments)

    return measure


def test_all_benchmarks_are_run(load_gpu):
    """A new script must be listed."""
    others = {"harness", "upcycling_tasks"}
    scripts = {path.stem for path in (SCRIPTS / "benchmarks").glob("*.py")} - others
    assert {benchmark.script for benchmark in load_gpu().BENCHMARKS} == scripts
    tested = {*SPEED, "expert_offload", "modality_ablation", "quantization", "upcycling"}
    assert scripts == tested


@pytest.mark.parametrize(
    ("dtype", "wrong", "agrees"), [("float32", 1, False), ("bfloat16", 8, True), ("bfloat16", 24, False)]
)
def test_blocks_with_different_outputs_are_not_compared(load_benchmark, dtype, wrong, agrees):
    """In bfloat16, a quarter of the tokens may have other experts."""
    module = load_benchmark("moe_layer")
    hidden_states = torch.randn(1, 64, 4).to(getattr(torch, dtype))
    other = hidden_states.clone()
    other[:, :wrong] += 1
    check = partial(module.check_equal, lambda states: states, lambda states: other, hidden_states)
    with nullcontext() if agrees else pytest.raises(AssertionError, match="unfair"):
        check()
