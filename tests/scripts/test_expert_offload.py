"""expert_offload.py with a tiny model: its counts and its report."""

import sys

import pytest
import torch


@pytest.fixture
def benchmark(load_benchmark, monkeypatch):
    module = load_benchmark("expert_offload")
    monkeypatch.setattr(module, "MIN_REPETITIONS", 1)
    return module


def test_report(benchmark, load_gpu, monkeypatch, capsys, tmp_path):
    figure = tmp_path / "figure.png"
    arguments = ["--json", "--quick", "--device", "cpu", "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["expert_offload.py", *arguments])
    benchmark.main()
    assert figure.stat().st_size > 1000
    printed = capsys.readouterr().out
    result = load_gpu().read_result(printed)
    rows = result["rows"]
    assert {row["metric"]: row["bar"] for row in rows if row["bar"] is not None} == {
        "bytes_per_token_vs_chosen": 1.1,
        "decode_vs_resident": 1.3,
        "decode_vs_accelerate": 0.5,
    }
    assert all("50% in slots" in row["case"] for row in rows if row["bar"] in (1.3, 0.5))
    decoding = [row["case"].partition(", hit rate")[0] for row in rows if row["metric"] == "decode_vs_accelerate"]
    assert decoding == [
        f"{kind}, disk, {share}% in slots" for kind in ("words of a text", "even tokens") for share in (25, 50, 75)
    ]
    first, *_, prefill, decode = rows
    assert (first["metric"], first["ratio"]) == ("bytes_per_token_vs_chosen", 1)
    assert first["peer"] == 2 * 1 * 3 * 32 * 16 * 4
    assert [prefill["metric"], decode["metric"]] == [
        "prefill_bytes_isolated_vs_joint",
        "decode_bytes_isolated_vs_joint",
    ]
    table = [line.split() for line in printed.splitlines()]
    assert [line for line in table if line[:3] == ["isolated", "prefill", "image"]]
    assert not [line for line in table if line[:3] == ["isolated", "decode", "image"] and float(line[3])], "only text"
    shares = {line[-4]: line[-3] for line in table if line[:2] == ["even", "tokens"] and line[-4].endswith("%")}
    assert list(shares) == ["12%", "50%", "100%"]


def test_bytes_of_an_expert(benchmark):
    size = benchmark.Size(hidden=8, width=4)
    assert size.expert_bytes(torch.float32) == 3 * 8 * 4 * 4
    assert size.expert_bytes(torch.bfloat16) == 3 * 8 * 4 * 2


def test_token_streams(benchmark):
    streams = benchmark.token_streams(50)
    assert set(streams) == {"words of a text", "even tokens"}
    assert all(set(tokens) == set(range(50)) for tokens in streams.values())
    assert streams["words of a text"][:3] == [0, 1, 2]
