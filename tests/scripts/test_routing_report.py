"""`routing-report` prints the result of `routing_statistics`."""

import json

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_sparse_moe_vlm.toolbox.commands import routing_report
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import conversations, scenes
from modeling_sparse_moe_vlm.toolbox.routing import measure_routing, routing_statistics
from tests.support.processors import make_image, make_processor, make_speaking_model
from tests.support.upcycled import make_speaking


@pytest.fixture(scope="module")
def model_folder(trained):
    return trained[0] / "model"


def statistics_of(folder, rows):
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    batch = VisionLanguageCollator(processor)([rows[i] for i in range(len(rows))])
    return routing_statistics(model.config.text_config, measure_routing(model, [batch]))


def test_of_held_out_scenes_in_batches(model_folder, run_verb, monkeypatch, tmp_path):
    monkeypatch.setattr(routing_report, "BATCH_SIZE", 4)
    statistics = statistics_of(model_folder, conversations(scenes("test", 11, cell_size=16)))
    arguments = ["--model", model_folder, "--num-examples", 11]
    printed = run_verb("routing-report", *arguments, "--output", tmp_path / "load.png")
    alarms = list(statistics.alarms().values())
    table = str(statistics).splitlines()
    lines = printed.splitlines()
    assert [line.split()[:4] for line in lines[: len(table)]] == [line.split()[:4] for line in table]
    assert len(lines) == len(table) + len(alarms)
    assert (tmp_path / "load.png").stat().st_size > 5000

    report = json.loads(run_verb("routing-report", *arguments, "--json"))
    assert [(row["place"], row["group"], row["modality"]) for row in report["rows"]] == [
        (row.place, row.group, row.modality) for row in statistics.rows
    ]
    for row, expected in zip(report["rows"], statistics.rows):
        assert row["num_tokens"] == expected.num_tokens > 0
        assert sum(row["wanted"]) == sum(expected.wanted)
        assert row["effective_experts"] == pytest.approx(expected.effective_experts, rel=0.1)
        assert row["entropy"] == pytest.approx(expected.entropy, rel=1e-4)
    assert len(report["alarms"]) == len(alarms)


def test_of_an_upcycled_model(run_verb, tmp_path):
    """The report distinguishes image tokens from text, and shows the real numbers of the layers."""
    make_speaking("llava", "isolated", layers=[1]).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    make_image().save(tmp_path / "image.png")
    asked = [{"type": "image"}, {"type": "text", "text": "Can you see the cat?"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]}
    row["images"] = [str(tmp_path / "image.png")]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    printed = run_verb("routing-report", "--model", tmp_path / "model", "--rows", tmp_path / "rows.jsonl", "--json")
    rows = json.loads(printed)["rows"]
    assert [(row["place"], row["group"], row["modality"]) for row in rows] == [
        ("layer_1", "text", "text"),
        ("layer_1", "image", "image"),
    ]
    assert rows[1]["num_tokens"] == 4
    assert sum(rows[1]["wanted"]) == 8
    assert rows[0]["num_tokens"] > 4


def test_of_rows_of_a_file_and_as_input_of_a_plan(model_folder, run_verb, tmp_path):
    make_image().save(tmp_path / "image.png")
    texts = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "yes"}]
    asked = [{"type": "image"}, {"type": "text", "text": "Can you see the cat?"}]
    rows = [
        {"messages": texts},
        {"messages": [{"role": "user", "content": asked}, texts[1]], "images": [str(tmp_path / "image.png")]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    printed = run_verb("routing-report", "--model", model_folder, "--rows", tmp_path / "rows.jsonl", "--json")
    expected = statistics_of(model_folder, rows)
    assert [row["wanted"] for row in json.loads(printed)["rows"]] == [list(row.wanted) for row in expected.rows]

    (tmp_path / "routing.json").write_text(printed)
    plan = ["place", model_folder, "--max-memory", "0=3MB", "1=1GB", "--routing", tmp_path / "routing.json", "--json"]
    (first, _) = json.loads(run_verb(*plan))["devices"]
    assert set(first["load"]) == {"text", "image"}


def test_nan_is_written_as_null(model_folder, run_verb, tmp_path):
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    printed = run_verb("routing-report", "--model", model_folder, "--rows", tmp_path / "rows.jsonl", "--json")
    rows = {row["modality"]: row for row in json.loads(printed, parse_constant=refuse)["rows"]}
    assert rows["image"]["num_tokens"] == 0
    assert rows["image"]["entropy"] is None
    assert rows["image"]["max_violation"] is None
    assert rows["text"]["entropy"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}\n{"messages"', "rows.jsonl, line 2 is not JSON: "),
        ('\n{"message": []}', "rows.jsonl, line 2 must be an object with `messages`."),
        ("[1]", "rows.jsonl, line 1 must be an object with `messages`."),
        ("\n", "rows.jsonl contains no conversations: "),
        ('{"messages": [{"role": "user", "content": "Why?"}]}', "have no assistant turn"),
    ],
)
def test_mistakes_in_files_are_named(model_folder, tmp_path, capsys, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["routing-report", "--model", str(model_folder), "--rows", str(tmp_path / "rows.jsonl")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_without_routed_experts_has_no_routing(tmp_path, capsys):
    make_speaking_model(mlp_only_layers=[0, 1]).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(SystemExit):
        main(["routing-report", "--model", str(tmp_path), "--rows", str(tmp_path / "rows.jsonl")])
    assert "has no routed experts" in capsys.readouterr().err


def test_rows_that_are_not_text(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"rows\.jsonl is not a JSONL file: "):
        routing_report.read_rows(tmp_path / "rows.jsonl")
