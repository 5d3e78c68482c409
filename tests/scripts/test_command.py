"""The command `sparse-moe-vlm`: its verbs, help texts with examples, and errors for mistakes in the input."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from modeling_sparse_moe_vlm import __version__
from modeling_sparse_moe_vlm.toolbox.commands.main import VERBS, build_parser, main, run_script
from modeling_sparse_moe_vlm.toolbox.commands.mistakes import mistakes_in_one_line
from modeling_sparse_moe_vlm.toolbox.commands.options import check_output
from tests.scripts.conftest import SCRIPTS

SCRIPTS_OF_VERBS = {
    "upcycle": "upcycle.py",
    "train": "train.py",
    "lora": "finetune_lora.py",
    "generate": "generate.py",
    "explain": "explain.py",
    "place": "place_experts.py",
    "info": "count_parameters.py",
}
# Each indented line of a docstring is an example.
EXAMPLES = [
    (verb, line.partition("  #")[0].strip())
    for verb, module in VERBS.items()
    for line in module.__doc__.splitlines()
    if line.startswith("    ")
]
OF_THE_COMMAND = [example.partition(" > ")[0] for _, example in EXAMPLES if example.startswith("sparse-moe-vlm ")]
# Verbs whose examples run within seconds, offline, on the model that `train` writes.
QUICK = ["info", "generate", "explain", "routing-report", "place"]
NEEDS_A_NETWORK = "Qwen/"


def test_verbs():
    of_models = ["upcycle", "train", "evaluate", "generate", "explain", "app", "lora"]
    assert list(VERBS) == [*of_models, "place", "routing-report", "push", "info"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example_of_itself(verb):
    assert any(example.startswith(f"sparse-moe-vlm {verb}") for of, example in EXAMPLES if of == verb)


@pytest.mark.parametrize("example", OF_THE_COMMAND)
def test_examples_are_understood(example):
    _, *arguments = shlex.split(example)
    assert build_parser().parse_args(arguments).verb == arguments[0]


@pytest.mark.slow
def test_quick_examples_run(trained, tmp_path, monkeypatch, capsys):
    """They run in the order of `QUICK` and in one folder, because some examples read what earlier ones wrote."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/demo").symlink_to(trained[0])
    for example in dict.fromkeys(example for verb in QUICK for of, example in EXAMPLES if of == verb):
        if NEEDS_A_NETWORK in example:
            continue
        if example.startswith("sparse-moe-vlm "):
            command, _, file = example.partition(" > ")
            main(shlex.split(command)[1:])
            printed = capsys.readouterr().out
            assert printed.strip(), example
            if file:
                (tmp_path / file).write_text(printed)
        else:
            subprocess.run(example, shell=True, check=True)
    written = {"explanation.png", "expert_load.png", "routing.json", "rows.jsonl", "map.json"}
    written |= {"report.html", "routing-report.html"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == written


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_is_its_docstring(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: sparse-moe-vlm {verb} ")
    assert VERBS[verb].__doc__.strip() in printed


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_verb_it_prints_help(arguments, capsys):
    if arguments:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    else:
        main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("usage: sparse-moe-vlm ")
    assert all(re.search(rf"^    {verb}\s", printed, flags=re.MULTILINE) for verb in VERBS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"sparse-moe-vlm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recycle"], "invalid choice: 'recycle'"),
        (["train", "--steps", "3"], "error: unrecognized arguments: --steps 3\n"),
        (["train", "m", "d"], "unrecognized arguments: m d. Name the model with `--model` and the data with `--data`."),
        (["lora", "m"], "unrecognized arguments: m. Name the model with `--model` and the data with `--data`."),
        (["explain", "m"], "unrecognized arguments: m. Name the model with `--model` and an image with `--image`."),
        (["place", "tiny", "m", "--max-memory", "0=1GB"], "error: unrecognized arguments: m\n"),
        (
            ["generate", "--model", "m", "--question", "a", "b"],
            "unrecognized arguments: b. Name the model with `--model` and images with `--image`.",
        ),
        (["generate", "--model", "m"], "required: --question"),
        (["place", "tiny"], "required: --max-memory"),
        (["info"], "required: model"),
        (["push", "outputs/demo/model"], "required: user/name"),
    ],
)
def test_wrong_usage_has_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--recipe", "nope"],
            "pass a path, or one of the names captioning, demo, easy_vqa, finetune, quickstart, retrieval, stamps_",
        ),
        (["train", "--set", "training.max_step=3"], "has keys ['max_step'], which a recipe cannot set"),
        (
            ["train", "--model", "clip", "--set", "tokenizer.vocab_size=300"],
            "`--set tokenizer.vocab_size=300`: the section `tokenizer` is for a model from scratch, but `model` is the",
        ),
        (["train", "--set", "model=nope.json"], "there is no model "),
        (
            ["train", "--set", "training.lr_scheduler_type=flat", "--output-dir", "."],
            "flat is not a valid SchedulerType",
        ),
        (["info", "wrong"], "Field 'hidden_size' expected int, got str (value: 'wide')"),
        (["train", "--output-dir", "file"], "File exists: 'file'"),
        (["train", "--resume", "--output-dir", "new"], "There is no checkpoint in new/checkpoints to resume from"),
        (["lora", "--recipe", "nope"], "one of the names all, attention, experts, finetune, image_experts."),
        (["lora", "--set", "lora.rank=3"], "has keys ['rank'], which a recipe cannot set"),
        (["lora", "--model", "outputs/none/model"], "There is no trained model 'outputs/none/model' yet: `make demo`"),
        (["evaluate", "--model", "outputs/none/model"], "no trained model 'outputs/none/model' yet"),
        (["evaluate", "--set", "data.grids=3"], "has keys ['grids']"),
        (["explain", "--model", "outputs/none/model"], "no trained model 'outputs/none/model' yet"),
        (["explain", "--image", "a.png"], "--image and --question must be given together"),
        (["explain", "--question", "Why?"], "--image and --question must be given together"),
        (["explain", "--scene", "-1"], "--scene must be at least 0, got -1."),
        (["routing-report", "--model", "outputs/none/model"], "no trained model 'outputs/none/model' yet"),
        (["generate", "--question", "Why?", "--model", "outputs/none/model"], "no trained model"),
        (["generate", "--question", "Why?", "--model", "clip", "--image", "a.png"], "--image: there is no file a.png."),
        (
            ["generate", "--question", "Why?", "--model", "clip", "--max-new-tokens", "0"],
            "--max-new-tokens must be at least 1, but got 0.",
        ),
        (["info", "tiny", "nope.json"], "there is no model "),
        (["place", "nope.json", "--max-memory", "0=1GB"], "there is no model "),
        (
            ["place", "tiny", "--max-memory", "80GB"],
            "--max-memory: '80GB' is not a budget such as 0=80GB or cpu=200GB.",
        ),
        (["place", "tiny", "--max-memory", "0=80"], "`max_memory[0]` is '80'"),
        (["place", "tiny", "--max-memory", "0=1GB", "--routing", "file"], "--routing: file is not a JSON file: "),
        (["place", "tiny", "--max-memory", "0=1GB", "--routing", "binary"], "--routing: binary is not a JSON file: "),
        (["place", "clip", "--max-memory", "0=1GB", "--num-expert-shards", "2"], "'clip_vision_model' have none."),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "binary").write_bytes(b"\x89PNG")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text('{"model_type": "clip_vision_model"}')
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong/config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert line == f"error: {stopped.value}"
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written after a mistake"


@pytest.mark.parametrize("verb", [["explain"], ["routing-report", "--output", "load.png"]])
def test_missing_extras_are_reported_in_one_line(verb, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ending:
        main([*verb, "--model", "nowhere"])
    assert ending.value.code == 2
    printed = capsys.readouterr().err
    assert printed.endswith(" needs matplotlib: pip install 'sparse-moe-vlm[report]'.\n")
    assert printed.count("\n") == 1


def test_other_errors_keep_their_traceback(capsys):
    with pytest.raises(SystemExit, match=r"^a b$"), mistakes_in_one_line():
        raise OSError("a\n  b")
    with pytest.raises(RuntimeError), mistakes_in_one_line():
        raise RuntimeError("a fault of the code")
    assert capsys.readouterr().err == "error: a b\n"


def test_scripts_name_the_options_of_models(run_here, capsys):
    with pytest.raises(SystemExit):
        run_here("train.py", "m")
    expected = "train.py: error: unrecognized arguments: m. Name the model with `--model` and the data with `--data`.\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_process_ends_with_exit_code_2_and_no_traceback(tmp_path):
    program = "from modeling_sparse_moe_vlm.toolbox.commands.main import main; main(['explain', '--scene', '-1'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith("error: --scene must be at least 0, got -1.\n")


@pytest.mark.parametrize("verb", SCRIPTS_OF_VERBS)
def test_scripts_are_the_verbs(verb, run_here, capsys):
    with pytest.raises(SystemExit):
        run_here(SCRIPTS_OF_VERBS[verb], "--help")
    of_script = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    of_verb = capsys.readouterr().out
    assert of_script.startswith(f"usage: {SCRIPTS_OF_VERBS[verb]} [-h]")
    assert of_script.partition("\n\n")[2] == of_verb.partition("\n\n")[2]


def test_every_script_is_a_verb():
    of_clones = {
        "data_memory.py",
        "gpu.py",
        "packing_census.py",
        "upcycling_census.py",
    }  # `make gpu`; pages of the documentation
    assert {path.name for path in SCRIPTS.glob("*.py")} == set(SCRIPTS_OF_VERBS.values()) | of_clones


@pytest.mark.parametrize("as_script", [False, True])
def test_ctrl_c(as_script, monkeypatch, capsys):
    def interrupt(arguments):
        # Programs that a shell starts in the background ignore interrupts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    monkeypatch.setattr(VERBS["info"], "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["count_parameters.py", "tiny"])
    with pytest.raises(SystemExit) as stopped:
        run_script("info") if as_script else main(["info", "tiny"])
    assert stopped.value.code == 130
    assert stopped.value.__suppress_context__
    assert capsys.readouterr() == ("", "interrupted\n")


def test_outputs_are_checked_without_writing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, is_folder in (("new", False), ("a/b/new", False), ("file", False), (".", True), ("a/b", True)):
        check_output(tmp_path / path, "output", is_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"`--output` must be a file, but .* is a folder\."):
        check_output(tmp_path, "output")
    for path, is_folder in (("file", True), ("file/a/b", False), ("file/a", True)):
        with pytest.raises(ValueError, match=r"`--output-dir` cannot be .*, because .*/file is a file and not"):
            check_output(tmp_path / path, "output_dir", is_folder)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    for path, where in (("new", tmp_path), ("file", tmp_path / "file")):
        with pytest.raises(ValueError, match=rf"because there is no permission to write to {where}\.$"):
            check_output(tmp_path / path, "output")
