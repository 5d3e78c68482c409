"""No verb ignores an option: every option either has an effect on what the command does, or is an error."""

import argparse
import json

import pytest

from modeling_sparse_moe_vlm import SparseMoeVlmRetrievalConfig
from modeling_sparse_moe_vlm.toolbox.commands.main import VERBS, main
from modeling_sparse_moe_vlm.toolbox.shipped_files import shipped_presets
from tests.scripts.test_command import SCRIPTS_OF_VERBS

OF_SOURCE = {"format", "image_root", "on_bad_row"}
OF_RUNS = {"recipe", "set", "output_dir", "resume", "model", "json"}
OF_TRAINING = {"data", "eval_data", "task", *OF_SOURCE, *OF_RUNS}
OF_EVALUATION = {"data", "image_root", "on_bad_row", "max_rows", "adapter", "task", "batch_size", "output_dir"}
OF_EVALUATION |= {"update_card", "trust_remote_code", "json"}
OF_ANSWERS = {*OF_EVALUATION, "format", "metrics", "max_new_tokens", "no_blind", "train_data", "resume"}
OF_ROUTING = {"model", "rows", "output", "json", "batch_size"}
OF_UPCYCLING = {"output", "dry_run", "json", "text", "vision", "dtype", "max_shard_size", "overwrite", "expert_groups"}
OF_UPCYCLING |= {"num_experts", "num_experts_per_tok", "start", "granularity", "drop_ratio", "layers", "router_init"}
OF_UPCYCLING |= {"set", "seed"}

# Ways of using a verb: its arguments, and the options that have an effect there. All other options must be refused.
MODES = {
    "train on scenes": (["train"], {"data", "check", "task", *OF_RUNS}),
    "train on a file": (["train", "--model", "tiny", "--data", "data.jsonl"], OF_TRAINING),
    "train on a folder": (["train", "--model", "tiny", "--data", "data"], {*OF_TRAINING, "split", "eval_split"}),
    "train with a file to evaluate on": (
        ["train", "--model", "tiny", "--data", "data", "--eval-data", "data.jsonl"],
        {*OF_TRAINING, "split", "eval_image_root"},
    ),
    "train on a dataset of the Hub": (
        ["train", "--model", "tiny", "--data", "user/data", "--eval-split", "test"],
        {*OF_TRAINING, "split", "eval_split", "subset", "eval_image_root"},
    ),
    "train a retrieval model": (
        ["train", "--model", "tiny", "--task", "retrieval", "--data", "data.jsonl"],
        OF_TRAINING - {"format"},
    ),
    "check a file": (["train", "--check", "data.jsonl"], {*OF_SOURCE, "check", "json", "bad_rows"}),
    "check a folder": (["train", "--check", "data"], {*OF_SOURCE, "check", "json", "bad_rows", "split"}),
    "check a dataset of the Hub": (
        ["train", "--check", "user/data"],
        {*OF_SOURCE, "check", "json", "bad_rows", "split", "subset"},
    ),
    "lora on scenes": (["lora"], {"data", *OF_RUNS}),
    "lora on a file": (["lora", "--model", "model", "--data", "data.jsonl"], OF_TRAINING),
    "evaluate on scenes": (["evaluate"], {"model", "recipe", "set", "json", "data"}),
    "evaluate on a file": (["evaluate", "model", "data.jsonl"], OF_ANSWERS),
    "evaluate on a folder": (["evaluate", "model", "data"], {*OF_ANSWERS, "split"}),
    "evaluate on a dataset of the Hub": (["evaluate", "model", "user/data"], {*OF_ANSWERS, "split", "subset"}),
    "evaluate next to a baseline": (
        ["evaluate", "model", "data.jsonl", "--train-data", "data.jsonl", "--on-bad-row", "skip"],
        {*OF_ANSWERS, "train_image_root", "bad_rows"},
    ),
    "evaluate a retrieval model": (["evaluate", "retrieval", "data.jsonl"], OF_EVALUATION),
    "generate": (["generate"], {"model", "image", "question", "max_new_tokens", "trust_remote_code"}),
    "explain a scene": (["explain"], {"model", "image", "question", "scene", "output", "json"}),
    "explain an image": (
        ["explain", "--image", "a.png", "--question", "b"],
        {"model", "image", "question", "output", "json"},
    ),
    "app": (["app", "model"], {"adapter", "host", "port", "share", "trust_remote_code", "space"}),
    "app as a space": (["app", "model", "--space", "space"], {"adapter", "trust_remote_code", "space"}),
    "place": (["place"], {"max_memory", "routing", "dtype", "num_expert_shards", "output", "json"}),
    "page of the routing of scenes": (["routing-report", "model"], {*OF_ROUTING, "num_examples", "num_drawn"}),
    "table of the routing of scenes": (["routing-report", "--model", "model"], {*OF_ROUTING, "num_examples"}),
    "drawing of the routing of scenes": (
        ["routing-report", "model", "--output", "load.png"],
        {*OF_ROUTING, "num_examples"},
    ),
    "routing of a file": (
        ["routing-report", "model", "data.jsonl"],
        {*OF_ROUTING, *OF_SOURCE, "max_rows", "num_drawn"},
    ),
    "routing of a folder, without bad rows": (
        ["routing-report", "model", "data", "--on-bad-row", "skip"],
        {*OF_ROUTING, *OF_SOURCE, "max_rows", "num_drawn", "bad_rows", "split"},
    ),
    "routing of conversations": (["routing-report", "--model", "model", "--rows", "data.jsonl"], OF_ROUTING),
    # A dry run takes all options of the upload that it describes.
    "push": (["push"], {"private", "revision", "create_pr", "base_model", "message", "force", "dry_run", "json"}),
    "info": (["info"], {"json"}),
    "upcycle": (
        ["upcycle", "model"],
        {*OF_UPCYCLING, "revision", "gguf_file", "native", "parity_bound", "no_comparison", "data"},
    ),
    "upcycle without a comparison": (
        ["upcycle", "model", "--output", "sparse", "--no-comparison"],
        {*OF_UPCYCLING, "revision", "gguf_file", "native", "no_comparison"},
    ),
    "upcycle from parts": (["upcycle", "--text", "model", "--output", "sparse"], {*OF_UPCYCLING, "data"} - {"dry_run"}),
}


def options_of(verb: str) -> dict[str, list[str]]:
    """Returns the options of a verb, each with an example of its use. A number is 0, which is not the same as none."""
    parser = argparse.ArgumentParser()
    VERBS[verb].add_arguments(parser)
    options = {}
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            value = [] if action.nargs == 0 else ["0" if action.type in (int, float) else "x"]
            value = ["1"] if action.dest == "num_drawn" else value  # 0 rows to draw fit a command that draws none
            options[action.dest] = [action.option_strings[0], *([action.choices[-1]] if action.choices else value)]
    return options


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a model, a retrieval model and data. No weights are needed to find the mistakes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = json.dumps({"question": "a", "answer": "b", "caption": "c"}) + "\n"
    (tmp_path / "data").mkdir()
    for name in ("data.jsonl", "data/train.jsonl", "data/test.jsonl"):
        (tmp_path / name).write_text(row)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes(shipped_presets("models")["tiny"].read_bytes())
    SparseMoeVlmRetrievalConfig().save_pretrained(tmp_path / "retrieval")
    return tmp_path


def test_every_verb_has_a_mode():
    assert {arguments[0] for arguments, _ in MODES.values()} == set(VERBS)
    assert set(SCRIPTS_OF_VERBS) <= set(VERBS)
    for arguments, used in MODES.values():
        assert used <= options_of(arguments[0]).keys(), f"{arguments}: an option of the table does not exist"


@pytest.mark.parametrize("mode", MODES)
def test_options_without_an_effect_are_refused(mode, folder, capsys):
    arguments, used = MODES[mode]
    for option, example in options_of(arguments[0]).items():
        if option in used or example[0] in arguments:
            continue
        before = sorted(folder.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *example])
        printed = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2, (option, printed)
        assert example[0] in printed or f"`data.{option}`" in printed or f"{option!r}" in printed, (option, printed)
        assert sorted(folder.rglob("*")) == before, f"{option}: something was written"
