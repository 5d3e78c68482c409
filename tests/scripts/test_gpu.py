"""gpu.py: the steps that it runs, the results that it keeps, and failures."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

GOOD = {
    "benchmark": "good",
    "device": "a CPU",
    "versions": {"torch": "1"},
    "rows": [
        {"case": "c", "metric": "m", "ours": 1.0, "peer": 3.0, "ratio": 1 / 3, "bar": 0.5, "holds": True},
        {"case": "d", "metric": "m", "ours": None, "peer": None, "ratio": None, "bar": None, "holds": True},
    ],
    "holds": True,
}
SLOW = GOOD | {"rows": [GOOD["rows"][0] | {"bar": 0.1, "holds": False}], "holds": False}
# Scripts that replace the benchmarks. good.py counts its runs in a file beside the results.
SCRIPTS = {
    "good": f"print('a table')\nprint({json.dumps(GOOD)!r})\nopen(r'{{folder}}/runs', 'a').write('x')",
    "slow_bar": f"print({json.dumps(SLOW)!r})",
    "bad": "import sys\nprint('on its way')\nsys.exit('it broke')",
    "silent": "print('no JSON')",
    "hangs": "import time\ntime.sleep(60)",
}


@pytest.fixture
def gpu(load_gpu, monkeypatch, tmp_path):
    """The module with replaced benchmarks and without the tests. `benchmarks` names the benchmarks to run."""
    module = load_gpu()
    for name, code in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(code.replace("{folder}", str(tmp_path)))

    def command(benchmark, options):
        return [sys.executable, str(tmp_path / f"{benchmark.script}.py")]

    monkeypatch.setattr(module, "benchmark_command", command)
    benchmarks = tuple(module.Benchmark(name, name, limit=1 if name == "hangs" else 30) for name in SCRIPTS)
    monkeypatch.setattr(module, "BENCHMARKS", benchmarks)
    return module


def _run(gpu, folder, *only, options=()):
    return gpu.main(["--device", "cpu", "--output", str(folder), "--only", *only, *options])


def test_one_failure_does_not_stop_the_others(gpu, tmp_path, capsys):
    folder = tmp_path / "results"
    assert _run(gpu, folder, "bad", "silent", "good", "slow_bar") == 1
    printed = capsys.readouterr().out
    assert "bad FAILED: exit code 1" in printed
    assert "    it broke" in printed
    assert "silent FAILED: the last line is not JSON" in printed
    assert "on its way" in (folder / "bad.log").read_text()
    saved = json.loads((folder / "good.json").read_text())
    assert {key: saved[key] for key in GOOD} == GOOD
    assert saved["command"][-1].endswith("good.py")
    assert {path.name for path in folder.glob("*.json")} == {"good.json", "slow_bar.json"}
    table = (folder / "table.md").read_text()
    assert table in printed
    assert table.startswith(f"# {gpu.harness.device_name('cpu')}\n\ntorch {torch.__version__}, transformers ")
    assert "| good | c | m | 1 | 3 | 0.3333 | 0.5 | yes |" in table
    assert "| good | d | m |  |  |  |  |  |" in table
    assert "| slow_bar | c | m | 1 | 3 | 0.3333 | 0.1 | **no** |" in table
    assert "**bad failed**: exit code 1" in table
    assert "**silent failed**" in table


def test_a_missed_bar_is_not_a_failure(gpu, tmp_path):
    assert _run(gpu, tmp_path / "results", "slow_bar") == 0


def test_finished_steps_are_not_run_again(gpu, tmp_path, monkeypatch):
    folder, runs = tmp_path / "results", tmp_path / "runs"
    for expected, options in (("x", []), ("x", []), ("xx", ["--again"])):
        assert _run(gpu, folder, "good", options=options) == 0
        assert runs.read_text() == expected
    path = folder / "good.json"
    path.write_text(path.read_text()[:50])  # as after a process that was killed while it was writing
    assert _run(gpu, folder, "good") == 0
    assert runs.read_text() == "xxx"
    command = gpu.benchmark_command
    monkeypatch.setattr(gpu, "benchmark_command", lambda *args: [*command(*args), "--larger"])
    assert _run(gpu, folder, "good") == 0
    assert runs.read_text() == "xxxx", "other options are another run"


def test_steps_that_take_too_long_are_stopped(gpu, tmp_path, capsys):
    start = time.monotonic()
    assert _run(gpu, tmp_path / "results", "hangs") == 1
    assert time.monotonic() - start < 30
    assert "hangs FAILED: it did not end within 1 s" in capsys.readouterr().out


def test_all_steps_together_have_a_limit(gpu, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "results"
    assert _run(gpu, folder, "good") == 0
    limits = []
    monkeypatch.setattr(gpu, "run", lambda command, log, environment, limit: limits.append(limit) or json.dumps(GOOD))
    assert _run(gpu, folder, "good", "slow_bar", "bad", options=["--minutes", "0.25"]) == 0
    assert limits == [14, 14], "finished steps take no time, and 15 s are less than the benchmarks' own limits"
    assert _run(gpu, folder, "good", "silent", options=["--minutes", "0"]) == 1
    assert len(limits) == 2
    assert "silent FAILED: there was no time left" in capsys.readouterr().out
    assert _run(gpu, folder, "silent") == 0
    assert limits[2] == 30, "its own limit"


def test_an_interruption_leaves_the_table_and_no_process(gpu, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    pid = tmp_path / "pid"
    (tmp_path / "hangs.py").write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open(r'{pid}', 'w').write(str(child.pid))\ntime.sleep(60)"
    )

    def interrupt(process, timeout):
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        raise KeyboardInterrupt

    assert _run(gpu, folder, "good") == 0
    monkeypatch.setattr("subprocess.Popen.communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _run(gpu, folder, "hangs")
    assert "| good | c |" in (folder / "table.md").read_text()
    assert not (folder / "hangs.json").exists()
    _wait_until_gone(int(pid.read_text()))


def _wait_until_gone(pid):
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("a process is left")


def test_steps(load_gpu):
    gpu = load_gpu()
    names = [benchmark.name for benchmark in gpu.BENCHMARKS]
    assert gpu.parse_arguments(["--device", "cpu"]).only == ["tests", *(n for n in names if n != "expert_lora_large")]
    assert gpu.parse_arguments(["--device", "cpu"]).quick
    assert gpu.parse_arguments(["--device", "cpu", "--only", "tests"]).only == ["tests"]


def test_commands(load_gpu, monkeypatch):
    gpu = load_gpu()
    by_name = {benchmark.name: benchmark for benchmark in gpu.BENCHMARKS}

    def options(name, device, quick):
        command = gpu.benchmark_command(by_name[name], SimpleNamespace(device=device, quick=quick))
        assert command[0] == sys.executable
        assert Path(command[1]).exists()
        return command[2:]

    assert options("expert_lora_large", "cuda:1", False) == ["--json", "--device", "cuda", "--size", "large"]
    assert options("moe_layer", "cuda", False) == ["--json", "--device", "cuda"]
    assert options("moe_layer", "cpu", True) == ["--json", "--device", "cpu", "--quick"]
    assert options("upcycling", "cuda", False) == ["--json", "--device", "cuda", "--quick"]
    tests = gpu.tests_command("cuda:1", Path())
    assert tests[1:7] == ["-m", "pytest", str(gpu.ROOT / "tests"), "-m", "numeric", "--device"]
    assert tests[7] == "cuda:1"


def test_a_benchmark_sees_one_gpu(load_gpu, monkeypatch):
    gpu = load_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (gpu.visible_gpu("cuda"), gpu.visible_gpu("cuda:2")) == ("0", "2")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "3, 5")
    assert (gpu.visible_gpu("cuda"), gpu.visible_gpu("cuda:1")) == ("3", "5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": None, "rows": []}, "no rows"),
        ({"rows": [{"case": "c"}]}, "no metric, ours"),
        ({"holds": False}, "`holds`"),
        ({"rows": [GOOD["rows"][0] | {"ours": float("nan")}]}, "NaN is not JSON"),
    ],
)
def test_malformed_results(load_gpu, change, message):
    gpu = load_gpu()
    assert gpu.read_result("a table\n" + json.dumps(GOOD)) == GOOD
    with pytest.raises(gpu.Failure, match=message):
        gpu.read_result(json.dumps(GOOD | change))
    for text in ("", "[]"):
        with pytest.raises(gpu.Failure, match=r"not JSON|no benchmark"):
            gpu.read_result(text)


def test_counts_of_the_tests(load_gpu):
    gpu = load_gpu()
    assert gpu.read_tests("....\n12 passed, 3 skipped, 40 deselected in 1.2s\n") == {"passed": 12, "skipped": 3}
    assert gpu.read_tests("1 passed in 1.2s") == {"passed": 1, "skipped": 0}
    with pytest.raises(gpu.Failure, match="no test"):
        gpu.read_tests("40 deselected in 1.2s")


def test_requirements_that_are_not_met(load_gpu, monkeypatch):
    gpu = load_gpu()
    assert gpu.missing_requirements() == []

    def installed(name):
        if name == "peft":
            raise gpu.PackageNotFoundError
        return "5.17.0" if name == "transformers" else version(name)

    version = gpu.version
    monkeypatch.setattr(gpu, "version", installed)
    assert gpu.missing_requirements() == [
        "transformers>=5.20,<6 is required, but 5.17.0 is installed",
        "peft>=0.21 is required, but is not installed",
    ]
