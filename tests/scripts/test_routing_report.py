"""`routing-report` prints the result of `routing_statistics`."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_sparse_moe_vlm.toolbox.commands import routing_report
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import conversations, scenes
from modeling_sparse_moe_vlm.toolbox.routing import measure_routing, routing_statistics
from tests.support.in_tree_moe import make_mixtral
from tests.support.processors import VOCAB_SIZE, make_image, make_processor, make_speaking_model, make_tokenizer
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


def make_captions(folder, number):
    """Writes a folder of images with captions, of which the second names a file that does not exist."""
    folder.mkdir()
    rows = [{"file_name": f"{i}.png", "text": f"the cat {i}"} for i in range(number)]
    for i in range(number):
        if i != 1:
            make_image(i).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_page_about_data_of_another_format(model_folder, run_verb, tmp_path):
    folder, page = make_captions(tmp_path / "images", 5), tmp_path / "report.html"
    arguments = ["routing-report", model_folder, folder, "--on-bad-row", "skip", "--bad-rows", tmp_path / "bad.jsonl"]
    printed = run_verb(*arguments, "--output", page, "--num-drawn", 2, "--batch-size", 2, "--max-rows", 3)
    lines = printed.splitlines()
    assert lines[0].split()[:3] == ["place", "group", "modality"]
    assert lines[-1] == str(page)
    source = page.read_text()
    assert f"{folder}, 3 rows" in source
    assert source.count("model’s answer") == 2
    assert "the cat 2" in source
    assert "the cat 4" not in source
    (bad,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert json.loads(bad)["row"] == 1

    with pytest.raises(SystemExit) as stopped:
        main(["routing-report", str(model_folder), str(folder), "--output", str(tmp_path / "other.html")])
    assert stopped.value.code == 2
    assert not (tmp_path / "other.html").exists()


def test_the_default_page(model_folder, run_verb, tmp_path, monkeypatch):
    """It is written if the model is an argument, unless only JSON is wanted."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--num-examples", 4, "--num-drawn", 0]
    as_json = run_verb("routing-report", model_folder, *arguments, "--json")
    assert len(json.loads(as_json)["rows"]) > 0
    with_option = run_verb("routing-report", "--model", model_folder, *arguments)
    assert list(tmp_path.iterdir()) == []
    assert run_verb("routing-report", model_folder, *arguments) == f"{with_option}routing-report.html\n"
    assert "held-out scenes of the demo, 4 rows" in (tmp_path / "routing-report.html").read_text()


def test_of_a_mixture_of_experts_of_transformers(run_verb, tmp_path):
    torch.manual_seed(0)
    make_mixtral(vocab_size=VOCAB_SIZE, num_experts=4).save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "yes"}))
    arguments = ["routing-report", tmp_path / "model", tmp_path / "rows.jsonl"]
    rows = json.loads(run_verb(*arguments, "--json"))["rows"]
    assert [(row["place"], row["group"], row["modality"], len(row["wanted"])) for row in rows] == [
        ("layer_0", "experts", "text", 4),
        ("layer_1", "experts", "text", 4),
    ]
    assert {row["experts_per_token"] for row in rows} == {2}
    run_verb(*arguments, "--output", tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    run_verb(*arguments, "--output", tmp_path / "report.html")
    assert f"{tmp_path / 'rows.jsonl'}, 1 row<" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--model", "n"], "the model is given twice: as an argument, and as `--model`."),
        (["m", "a.jsonl", "--rows", "b.jsonl"], "the data is given twice: as an argument, and as `--rows`."),
        (["m", "--format", "vqa"], "`--format` only has an effect if the data is an argument."),
        (["m", "--max-rows", "3"], "`--max-rows` only has an effect if the data is an argument."),
        (["m", "a.jsonl", "--max-rows", "0"], "`--max-rows` must be at least 1, but got 0."),
        (["m", "a.jsonl", "--batch-size", "0"], "`--batch-size` must be at least 1, but got 0."),
        (["m", "--num-examples", "0"], "`--num-examples` must be at least 1, but got 0."),
        (["m", "--num-drawn", "-1"], "`--num-drawn` must be at least 0, but got -1."),
    ],
)
def test_arguments_that_contradict_each_other(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["routing-report", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_texts_with_other_ends_of_lines(tmp_path):
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("a\u2028b", "c\x85d")]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    assert routing_report.read_rows(tmp_path / "rows.jsonl") == rows


def test_a_wrong_output_is_an_error_before_the_work(model_folder, run_verb, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(routing_report, "_measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        main(["routing-report", str(model_folder), "--output", str(tmp_path / "file/report.html")])
    assert f"`--output` cannot be {tmp_path}/file/report.html, because {tmp_path}/file is a file" in (
        capsys.readouterr().err
    )


def test_rows_that_are_not_text(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"rows\.jsonl is not a JSONL file: "):
        routing_report.read_rows(tmp_path / "rows.jsonl")
