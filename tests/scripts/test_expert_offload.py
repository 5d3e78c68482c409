"""expert_offload.py, with a tiny model: what it counts, and the form of what it reports."""

import importlib.util
import json
import sys

import pytest

from tests.scripts.conftest import SCRIPTS

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 8}
SMALL |= {
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    spec = importlib.util.spec_from_file_location("expert_offload", SCRIPTS / "benchmarks/expert_offload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {
        "SIZES": module.SIZES | SMALL,
        "EXPERTS": 8,
        "LAYERS": 2,
        "CHOSEN": 1,
        "VOCABULARY": 128,
        "STEPS": 2,
        "MIN_REPETITIONS": 1,
    }
    small["KINDS"] = {kind: [token % 128 for token in tokens] for kind, tokens in module.KINDS.items()}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_report(benchmark, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "picture.png"
    arguments = ["--json", "--quick", "--device", "cpu", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["expert_offload.py", *arguments])
    benchmark.main()
    assert picture.stat().st_size > 1000
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    rows = {row["metric"]: row for row in reversed(result["rows"])}  # the barred ones come first
    assert {name: row["bar"] for name, row in rows.items()} == {
        "bytes_per_token_vs_chosen": 1.1,
        "decode_vs_resident": 1.3,
        "decode_vs_accelerate": 0.5,
        "prefill_bytes_isolated_vs_joint": None,
        "decode_bytes_isolated_vs_joint": None,
    }
    assert rows["bytes_per_token_vs_chosen"]["ratio"] == 1
    assert rows["bytes_per_token_vs_chosen"]["peer"] == 2 * 1 * 3 * 32 * 16 * 4
    assert result["holds"] == all(row["holds"] for row in result["rows"])
    table = [line.split() for line in printed.splitlines()]
    assert [line for line in table if line[:3] == ["isolated", "prefill", "image"]]
    assert not [line for line in table if line[:3] == ["isolated", "decode", "image"] and float(line[3])], "text alone"
    shares = {line[-4]: line[-3] for line in table if line[:2] == ["even", "tokens"] and line[-4].endswith("%")}
    assert list(shares) == ["12%", "50%", "100%"]
