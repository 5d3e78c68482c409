"""Runs on own data: rows, losses, what trains in each stage, resuming, and errors."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from modeling_sparse_moe_vlm.toolbox.data import BadRowError, VisionLanguageCollator, load_rows
from modeling_sparse_moe_vlm.toolbox.data.bad_rows import SkippedRows
from modeling_sparse_moe_vlm.toolbox.demo import scene_pairs, scenes
from modeling_sparse_moe_vlm.toolbox.evaluation import evaluate_rows, own_data, score_answers
from modeling_sparse_moe_vlm.toolbox.expert_lora.recipe_run import LoraRun
from modeling_sparse_moe_vlm.toolbox.expert_lora.recipes import load_lora_recipe
from modeling_sparse_moe_vlm.toolbox.shipped_files import find_preset
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, from_checkpoint, from_scratch, model_parts
from modeling_sparse_moe_vlm.toolbox.training.own_data import check_own_data
from modeling_sparse_moe_vlm.toolbox.training.recipe_run import TrainingRun
from modeling_sparse_moe_vlm.toolbox.training.recipes import load_recipe
from modeling_sparse_moe_vlm.toolbox.training.retrieval_run import OwnPairs
from modeling_sparse_moe_vlm.toolbox.training.run_data import OwnRows
from tests.support.models import TINY_DECODER
from tests.support.processes import ROOT
from tests.support.processors import VOCAB_SIZE, make_processor, make_speaking_model, make_tokenizer
from tests.toolbox.data.data_files import GREEN, RED, write_image, write_lines
from tests.toolbox.upcycling.test_processors import make_llava_processor

TRAINING = """
training:
  max_steps: 2
  per_device_train_batch_size: 3
  learning_rate: 1.0e-2
  logging_steps: 1
  save_strategy: steps
  save_steps: 1
  report_to: none
  use_cpu: true
  disable_tqdm: true
"""
STAGES = """
stages:
- {name: connector, parts: {connector: train, rest: freeze}}
- {name: all, training: {max_steps: 3, learning_rate: 1e-3}}
- {name: experts, parts: {experts: 5e-3, rest: freeze}, training: {max_steps: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows with and without images, a bad row, and a small model."""
    folder = tmp_path_factory.mktemp("own")
    write_image(folder / "red.png", (16, 16), RED)
    write_image(folder / "green.png", (16, 16), GREEN)
    rows = [{"image": f"{color}.png", "question": "a cat?", "answer": color} for color in ("red", "green")] * 3
    rows += [{"question": "the mat", "answer": "sat " * 20}, {"question": "the cat", "answer": " "}]
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "test.jsonl", rows[:2])
    torch.manual_seed(0)
    make_speaking_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    return folder


def write_recipe(folder: Path, text: str = "", name: str = "recipe") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"model: {folder / 'model'}\ndata: {{train: {folder / 'train.jsonl'}, on_bad_row: skip}}\n{TRAINING}{text}"
    )
    return path


def run(recipe: Path, output_dir: Path, *overrides: str, resume: bool = False) -> TrainingRun:
    training = TrainingRun(load_recipe(recipe, overrides), output_dir, resume)
    training.print_model()
    assert training.train()
    return training


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def losses(checkpoint: Path) -> list[float]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_equals_a_trainer_with_the_same_rows(folder, tmp_path):
    training = run(write_recipe(folder), tmp_path / "run")
    assert isinstance(training.skipped.entries(), list)
    (entry,) = map(json.loads, (tmp_path / "run/skipped_rows.jsonl").read_text().splitlines())
    assert (entry["source"], entry["row"], entry["kind"]) == (str(folder / "train.jsonl"), 7, "empty answer")

    rows = load_rows(folder / "train.jsonl", on_bad_row="skip")
    assert [row["row"] for row in training.data.train] == [row["row"] for row in rows] == list(range(7))
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", output_router_logits=True)
    processor = AutoProcessor.from_pretrained(folder / "model")
    arguments = TrainingArguments(
        str(tmp_path / "plain"), remove_unused_columns=False, **load_recipe(write_recipe(folder)).training
    )
    trainer = Trainer(model, arguments, VisionLanguageCollator(processor), train_dataset=rows)
    trainer.train()
    expected = losses(tmp_path / "plain/checkpoint-2")
    assert len(expected) == 2
    assert losses(tmp_path / "run/checkpoints/checkpoint-2") == expected
    assert_same(weights(tmp_path / "run/model"), weights(tmp_path / "plain/checkpoint-2"))


def test_stages_train_their_parts_and_resume(folder, tmp_path, capsys):
    """A run that stopped in the second stage, or before it, ends with the same weights and metrics."""
    recipe = write_recipe(folder, STAGES, "stages")
    output = tmp_path / "run"
    training = run(recipe, output)
    printed = capsys.readouterr().out
    # The connector, all, and the experts, in parameters.
    by_part = {part: sum(p.numel() for p in own.values()) for part, own in model_parts(make_speaking_model()).items()}
    experts = sum(size for part, size in by_part.items() if part.startswith("experts."))
    trained = [by_part["connector"], sum(by_part.values()), experts]
    totals = [line.split() for line in printed.splitlines() if line.startswith("all  ")]
    assert [total[2] for total in totals] == [f"{number:,}" for number in trained]
    assert re.findall(r"^Stage (.*)$", printed, re.MULTILINE) == [
        "connector:",
        "all:",
        "experts:",
        "connector (1 of 3)",
        "all (2 of 3)",
        "experts (3 of 3)",
    ]

    models = [folder / "model", output / "stages/connector", output / "stages/all", output / "model"]
    loaded = [dict(AutoModelForImageTextToText.from_pretrained(path).named_parameters()) for path in models]
    parts = model_parts(make_speaking_model())
    changed = [
        {name for name in before if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(loaded)
    ]
    assert changed[0] == set(parts["connector"])
    assert {*parts["connector"], *parts["attention"], *parts["routers"]} <= changed[1]
    assert changed[2] <= {name for part, own in parts.items() if part.startswith("experts.") for name in own}
    assert changed[2]

    metrics = training.metrics["stages"]
    assert [(name, own["steps"], own["num_trained_parameters"]) for name, own in metrics.items()] == [
        ("connector", 2, trained[0]),
        ("all", 3, trained[1]),
        ("experts", 1, trained[2]),
    ]
    for name, steps in (("connector", 2), ("all", 3), ("experts", 1)):
        own = losses(output / f"checkpoints/{name}/checkpoint-{steps}")
        assert metrics[name]["train_loss"] == pytest.approx(sum(own) / steps, abs=1e-3)
    state = json.loads((output / "checkpoints/all/checkpoint-3/trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])

    final = weights(output / "model")
    stopped = tmp_path / "stopped"
    for kept in ("checkpoint-1", None):
        # The run was killed in the second stage: after its first step, or before its first checkpoint.
        shutil.rmtree(stopped, ignore_errors=True)
        shutil.copytree(output, stopped)
        shutil.rmtree(stopped / "model")
        shutil.rmtree(stopped / "checkpoints/experts")
        for path in (stopped / "stages/all", *(stopped / "checkpoints/all").iterdir()):
            if path.name != kept:
                shutil.rmtree(path)
        (stopped / "stages/all.json").unlink()
        (stopped / "stages/experts.json").unlink()
        resumed = run(recipe, stopped, resume=True)
        where = "its start" if kept is None else str(stopped / "checkpoints/all/checkpoint-1")
        printed = capsys.readouterr().out
        assert f"The training resumes in the stage all from {where}." in printed
        assert "Stage connector (1 of 3)" not in printed
        assert_same(weights(stopped / "model"), final)
        assert losses(stopped / "checkpoints/all/checkpoint-3") == losses(output / "checkpoints/all/checkpoint-3")
        assert list(resumed.metrics["stages"]) == ["connector", "all", "experts"]
        for name, own in resumed.metrics["stages"].items():
            assert own["steps"] == metrics[name]["steps"]

    # The resolved recipe gives the same result. A new run in the same folder starts from the beginning.
    again = run(output / "recipe.yaml", stopped)
    assert again.first == 0
    assert_same(weights(stopped / "model"), final)
    with pytest.raises(ValueError, match=r"There is no checkpoint in .*connector to resume from"):
        TrainingRun(load_recipe(recipe), tmp_path / "new", resume=True)


def test_stages_can_have_their_own_data(folder, tmp_path):
    stages = f"stages: [{{name: a}}, {{name: b, data: {{train: {folder / 'test.jsonl'}}}}}]"
    training = TrainingRun(load_recipe(write_recipe(folder, stages, "data"), ["training.max_steps=1"]), tmp_path)
    assert len(training.data.train) == 7
    assert training.train()
    assert [row["source"] for row in training.data.train] == [str(folder / "test.jsonl")] * 2
    assert training.data.data["on_bad_row"] == "skip"


def test_limits_skip_rows_and_stop_batches(folder, tmp_path):
    processor = make_processor()
    rows = list(load_rows(folder / "train.jsonl", on_bad_row="skip"))
    sizes = VisionLanguageCollator(processor)(rows).row_sizes
    longest = max(size.tokens for size in sizes)
    assert longest == sizes[6].tokens
    training = TrainingRun(load_recipe(write_recipe(folder), [f"data.max_length={longest - 1}"]), tmp_path)
    assert [row["row"] for row in training.data.train] == list(range(6))
    assert [entry["row"] for entry in training.skipped.entries()] == [6, 7]
    training = TrainingRun(load_recipe(write_recipe(folder), ["data.max_image_tokens=3"]), tmp_path)
    assert [row["row"] for row in training.data.train] == [6]
    with pytest.raises(BadRowError, match=r"train.jsonl, row 0: the row has 4 image tokens in 1 images, more than"):
        TrainingRun(load_recipe(write_recipe(folder), ["data.max_image_tokens=3", "data.on_bad_row=error"]), tmp_path)
    training = TrainingRun(load_recipe(write_recipe(folder), ["data.max_image_tokens_per_batch=4"]), tmp_path)
    assert training.collator.max_image_tokens_per_batch == 4
    with pytest.raises(ValueError, match=r"the batch has (8|12) image tokens, more than `max_image_tokens_per_batch`"):
        training.train()


def test_presets_are_trained_from_scratch_on_texts_and_pixels_of_the_data(folder, tmp_path):
    overrides = ["model=tiny", "tokenizer.vocab_size=300", "data.max_length=40"]
    training = TrainingRun(load_recipe(write_recipe(folder), overrides), tmp_path)
    torch.manual_seed(0)
    _, processor = from_scratch("tiny", load_rows(folder / "train.jsonl", on_bad_row="skip"), vocab_size=300)
    assert training.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert "Ġcat" in processor.tokenizer.get_vocab() or "cat" in processor.tokenizer.get_vocab()
    # Half of the images is red, and half is green.
    assert training.processor.image_processor.image_mean == pytest.approx([0.5, 0.5, 0], abs=1e-6)
    assert processor.image_processor.image_mean == training.processor.image_processor.image_mean
    stream = load_rows(folder / "train.jsonl", on_bad_row="skip", streaming=True)
    _, other = from_scratch("tiny", stream, vocab_size=300)
    assert other.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert other.image_processor.image_mean == processor.image_processor.image_mean


def test_models_of_other_classes_and_language_models(folder, tmp_path, capsys):
    """Their chat templates do not mark the turns of the assistant. A language model skips rows with images."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8})).save_pretrained(
        tmp_path / "text"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "text")
    test = write_lines(tmp_path / "test.jsonl", [{"question": "the mat", "answers": ["cat", "mat"]}])
    overrides = [f"model={tmp_path / 'text'}", f"data.eval={test}", "evaluation.max_new_tokens=2"]
    training = run(write_recipe(folder), tmp_path / "run", *overrides)
    assert [row["row"] for row in training.data.train] == [6]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").num_parameters() > 0
    batch = training.collator(list(training.data.train))
    targets = batch["labels"][batch["labels"] != -100]
    assert tokenizer.decode(targets) == "sat " * 20 + "<|im_end|>"
    assert training.evaluate()["eval"].keys() == {"vqa_accuracy", "exact_match"}
    (entry,) = map(json.loads, (tmp_path / "run/predictions.jsonl").read_text().splitlines())
    assert entry["references"] == ["cat", "mat"]
    training.draw()
    training.print_how_to_load()
    printed = capsys.readouterr().out
    assert "AutoModelForCausalLM.from_pretrained" in printed
    assert "content = 'the mat'" in printed
    assert "Skipped bad rows: 7 (6 × cannot be processed, 1 × empty answer)" in printed
    assert not (tmp_path / "run/example.png").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=5"], "`data.train` must be a text, such as a path, but got 5"),
        (["data.image_root=5"], "`data.image_root` must be a text, such as a path, but got 5"),
        (["data.train=gone.jsonl"], "there is no file or folder 'gone.jsonl'"),
        (["data.eval={folder}/train.jsonl"], "`data.train` and the data for evaluation are the same (.*train.jsonl)"),
        (["data.eval_split=test"], "`data.train` and the data for evaluation are the same"),
        (["data.train={folder}", "data.eval={folder}"], "`data.train` and the data for evaluation are the same"),
        (["data.eval_image_root=5"], "`data.eval_image_root` must be a text, such as a path, but got 5"),
        (
            ["data.eval_image_root=."],
            "`data.eval_image_root` only has an effect with rows for evaluation",
        ),
        (["data.split=test"], "`data.split` only has an effect with a folder .*, but .*train.jsonl is a file"),
        (
            ["data.eval={folder}/test.jsonl", "data.eval_split=test"],
            "`data.eval_split` only has an effect with a folder .*, but .*test.jsonl is a file",
        ),
        (["data.subset=a"], "`data.subset` only has an effect with a dataset of the Hub, but the data is local"),
        (
            ["data.train={folder}", "data.eval_split=test", "data.subset=a"],
            "`data.subset` only has an effect",
        ),
        (["data.train={folder}", "data.eval_split=dev"], "has no split 'dev': its splits are train, validation, test"),
        (["data.streaming=true", "training.max_steps=-1"], "`data.streaming` needs `training.max_steps`"),
        (["data.format=captions"], "all rows of .*train.jsonl are bad. Skipped bad rows: 8 .8 × missing field."),
        (["data.on_bad_row=error"], "train.jsonl, row 7: the answer in messages.1. is empty"),
        (["data.num_train=5"], r"`data` of the recipe .* has keys \['num_train'\], which a recipe cannot set"),
        (["task=ocr"], "`task` must be one of vqa, captioning, .*, but got 'ocr'. .in the recipe"),
        (["model=tiny", "dtype=float32"], "`dtype` of the recipe is for a checkpoint, but `model` is .* tiny: a model"),
        (["dtype=int8"], "`dtype` of the recipe .* must be one of float32, bfloat16, float16, got 'int8'"),
        (["stages=a"], "`stages` of the recipe .* must be a list such as"),
        (["stages=[a]"], "`stages` of the recipe .* must be a list such as .*, got 'a'"),
        (["stages=[{name: a}, {name: a}]"], "`stages` of the recipe .* has 'a' twice"),
        (["stages=[{name: a/b}]"], "`stages.0..name` must start with a letter .*, got 'a/b'"),
        (["stages=[{name: a, model: b}]"], r"the stage 'a' of the recipe .* has keys \['model'\]; known ones are name"),
        (["stages=[{name: a, training: {max_step: 1}}]"], r"`stages.a.training` of .* has keys \['max_step'\]"),
        (["stages=[{name: a, training: {max_steps: x}}]"], "`stages.a.training.max_steps` must be a whole number"),
        (["stages=[{name: a, parts: {routers: x}}]"], "`parts.routers` must be .*in the stage 'a' of the recipe"),
        (["stages=[{name: a, parts: {experts: {audio: freeze}}}]"], "`parts.experts.audio` must .* .in the stage 'a'."),
        (["stages=[{name: a}]", "stages.b.training.seed=1"], "there is no 'b' among a"),
    ],
)
def test_mistakes(folder, tmp_path, overrides, message):
    overrides = [override.replace("{folder}", str(folder)) for override in overrides]
    with pytest.raises((ValueError, OSError), match=message):
        TrainingRun(load_recipe(write_recipe(folder), overrides), tmp_path)


def test_built_in_data_and_own_data_are_not_mixed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: tiny\ndata: {num_train: 5}\nstages: [{name: a, data: {train: b.jsonl}}]")
    with pytest.raises(ValueError, match=r"`stages.a.data` of the recipe .* has own data .`train`., but `data`"):
        load_recipe(path)
    path.write_text("model: tiny\ndata: {num_train: 5}\nstages: [{name: a, data: {num_train: 3}}]")
    assert load_recipe(path).stages == [{"name": "a", "data": {"num_train": 3}}]


def test_overrides_of_stages(folder):
    overrides = ["stages.all.training.max_steps=7", "stages.0.parts.routers=freeze", "stages.2.data.max_length=9"]
    recipe = load_recipe(write_recipe(folder, STAGES, "stages"), overrides)
    assert recipe.stages == [
        {"name": "connector", "parts": {"connector": "train", "rest": "freeze", "routers": "freeze"}},
        {"name": "all", "training": {"max_steps": 7, "learning_rate": 0.001}},
        {
            "name": "experts",
            "training": {"max_steps": 1},
            "data": {"max_length": 9},
            "parts": {"experts": 0.005, "rest": "freeze"},
        },
    ]


def test_scores_are_those_of_an_evaluation_of_the_saved_model(folder, tmp_path):
    """Answers are batched by length, and the files are the same. `sparse-moe-vlm evaluate` has the same defaults."""
    rows = [{"image": "red.png", "question": "the cat " * n, "answers": ["red", "a"]} for n in (1, 3, 2)]
    test = write_lines(folder / "three.jsonl", rows)
    evaluation = {"batch_size": 2, "max_new_tokens": 3, "metrics": ["exact_match", "anls"]}
    training = run(write_recipe(folder, f"evaluation: {evaluation}"), tmp_path / "run", f"data.eval={test}")
    batches = []
    with pytest.MonkeyPatch.context() as patched:
        answer = own_data.answer_batch
        patched.setattr(own_data, "answer_batch", lambda m, p, b, **k: batches.append(list(b)) or answer(m, p, b, **k))
        scores = training.evaluate()["eval"]
    assert batches == [[1, 2], [0]]
    model, processor = from_checkpoint(tmp_path / "run/model")
    expected = evaluate_rows(model, processor, load_rows(test), blind=False, folder=tmp_path / "again", **evaluation)
    assert scores == expected.scores
    written = (tmp_path / "run/predictions.jsonl").read_text()
    assert written == (tmp_path / "again/predictions.jsonl").read_text()
    assert json.loads(written.splitlines()[0]).keys() == {
        *("source", "row", "question", "prediction", "references", "scores")
    }


def test_rows_without_a_right_answer_are_found_before_the_training(folder, tmp_path):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    test = write_lines(tmp_path / "test.jsonl", [{"messages": turns[:2]}, {"messages": turns}])
    with pytest.raises(ValueError, match=r"test.jsonl, row 1: the last message must be from the assistant"):
        TrainingRun(load_recipe(write_recipe(folder), [f"data.eval={test}"]), tmp_path / "run")


def test_llava_trains_on_own_data(folder, tmp_path):
    from transformers import LlamaConfig

    from tests.support.in_tree_models import make_llava

    torch.manual_seed(0)
    make_llava(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8})).save_pretrained(tmp_path / "m")
    processor = make_llava_processor()
    processor.chat_template = processor.chat_template.replace("{{ message['role'] }}:", "{{ message['role'] }}: ")
    processor.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    processor.save_pretrained(tmp_path / "m")
    training = run(write_recipe(folder), tmp_path / "run", f"model={tmp_path / 'm'}")
    batch = training.collator([training.data.train[0]])
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "red"
    before, after = weights(tmp_path / "m"), weights(tmp_path / "run/model")
    assert [name for name in before if torch.equal(before[name], after[name])] != list(before)


def test_streams_and_evaluation_during_training(folder, tmp_path):
    overrides = [f"data.eval={folder / 'test.jsonl'}", "training.eval_strategy=steps", "stages=[{name: a}]"]
    stage = run(write_recipe(folder), tmp_path / "run", *overrides).metrics["stages"]["a"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/model", output_router_logits=True)
    batch = VisionLanguageCollator(make_processor())(list(load_rows(folder / "test.jsonl")))
    with torch.no_grad():
        loss = model.eval()(**batch).loss.item()
    assert stage["eval_loss"] == pytest.approx(loss, abs=1e-4)

    run(write_recipe(folder), tmp_path / "stream", "data.streaming=true")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", output_router_logits=True)
    arguments = TrainingArguments(
        str(tmp_path / "plain"), remove_unused_columns=False, **load_recipe(write_recipe(folder)).training
    )
    rows = load_rows(folder / "train.jsonl", on_bad_row="skip", streaming=True)
    SparseMoeTrainer(model, arguments, VisionLanguageCollator(make_processor()), train_dataset=rows).train()
    assert losses(tmp_path / "stream/checkpoints/checkpoint-2") == losses(tmp_path / "plain/checkpoint-2")


def test_weights_train_in_float32(folder, tmp_path):
    AutoModelForImageTextToText.from_pretrained(folder / "model").bfloat16().save_pretrained(tmp_path / "m")
    make_processor().save_pretrained(tmp_path / "m")
    for overrides, dtype in (([], torch.float32), (["dtype=bfloat16"], torch.bfloat16)):
        recipe = load_recipe(write_recipe(folder), [f"model={tmp_path / 'm'}", *overrides])
        training = TrainingRun(recipe, tmp_path / "run")
        assert {parameter.dtype for parameter in training.model.parameters()} == {dtype}


def test_packing_is_passed_to_the_collator(folder, tmp_path):
    training = TrainingRun(load_recipe(write_recipe(folder), ["data.packing=true"]), tmp_path)
    assert training.collator.packing
    assert "position_ids" in training.collator(list(training.data.train))
    training = TrainingRun(load_recipe(write_recipe(folder)), tmp_path)
    assert "position_ids" not in training.collator(list(training.data.train))


def test_generated_answers_stop_the_training_early(folder, tmp_path):
    """The first evaluation is the best one, because the model hardly changes."""
    overrides = [
        f"data.eval={folder / 'test.jsonl'}",
        "training.eval_strategy=steps",
        "training.eval_steps=1",
        "training.max_steps=9",
        "training.learning_rate=1e-9",
        "training.metric_for_best_model=exact_match",
        "evaluation={early_stopping_patience: 2, sample: 1, max_new_tokens: 2}",
    ]
    run(write_recipe(folder), tmp_path, *overrides)
    state = json.loads((tmp_path / "checkpoints/checkpoint-3/trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2, 3]
    assert all({"eval_exact_match", "eval_vqa_accuracy"} <= entry.keys() for entry in evaluations)
    assert not (tmp_path / "checkpoints/checkpoint-4").exists()
    files = sorted((tmp_path / "checkpoints/generated_answers").iterdir())
    assert [len(path.read_text().splitlines()) for path in files] == [1, 1, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.eval_strategy=steps"], "`training.eval_strategy` needs rows for evaluation: set `data.eval`"),
        (["evaluation.sample=3"], "`evaluation.sample` only has an effect with evaluation during training"),
        (["evaluation.early_stopping_patience=1"], "`evaluation.early_stopping_patience` only has an effect with"),
        (["evaluation.sample=0", "training.eval_strategy=steps"], "`evaluation.sample` must be at least 1, got 0"),
        (["evaluation.batch_size=0"], "`evaluation.batch_size` must be at least 1, got 0"),
        (["evaluation.max_new_tokens=0"], "`evaluation.max_new_tokens` must be at least 1, got 0"),
        (
            ["evaluation.early_stopping_patience=1", "training.eval_strategy=steps"],
            "`evaluation.early_stopping_patience` needs `training.metric_for_best_model`, such as 'loss'",
        ),
    ],
)
def test_mistakes_about_evaluation_during_training(folder, tmp_path, overrides, message):
    if "needs rows" not in message:
        overrides = [*overrides, f"data.eval={folder / 'test.jsonl'}"]
    with pytest.raises(ValueError, match=message):
        TrainingRun(load_recipe(write_recipe(folder), overrides), tmp_path)


def test_splits_of_a_folder(folder, tmp_path):
    overrides = [f"data.train={folder}", "data.eval_split=test", "data.format=vqa", "model=tiny"]
    training = TrainingRun(load_recipe(write_recipe(folder), overrides), tmp_path)
    assert {row["source"] for row in training.data.train} == {str(folder / "train.jsonl")}
    assert [row["source"] for row in training.data.eval] == [str(folder / "test.jsonl")] * 2
    assert training.report.metrics == ["vqa_accuracy", "exact_match"]


def test_fields_of_the_configuration_are_for_new_models(folder, tmp_path):
    recipe = write_recipe(folder, "config: {pixel_shuffle_factor: 1}\n", "config")
    with pytest.raises(ValueError, match=r"`config` of the recipe is for a model from scratch, but .* checkpoint"):
        TrainingRun(load_recipe(recipe), tmp_path / "run")


def test_a_subset_is_for_the_data_of_the_hub_among_both():
    """The names of datasets of the Hub are not looked up here."""
    for data in ({"train": "user/name"}, {"train": __file__, "eval": "user/name"}, {"train": "user/name", "eval": "."}):
        check_own_data(data | {"subset": "a"}, 1)
    check_own_data({"train": "user/name", "split": "a", "eval_split": "b", "eval_image_root": "."}, 1)


def test_rows_for_evaluation_can_have_their_own_images(tmp_path):
    row = {"image": "0.png", "caption": "a cat"}
    for name, color in (("train", RED), ("test", GREEN)):
        write_image(tmp_path / f"images/{name}/0.png", (8, 8), color)
        write_lines(tmp_path / f"{name}.jsonl", [row])
    names = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "test.jsonl")}
    roots = {"image_root": str(tmp_path / "images/train"), "eval_image_root": str(tmp_path / "images/test")}
    for data, color in (
        (names | roots, GREEN),
        (names | {"image_root": roots["image_root"]}, RED),  # by default, the images are in the same folder
    ):
        own, pairs = OwnRows(data, None), OwnPairs(data, SkippedRows(tmp_path / "skipped.jsonl"))
        own.use(make_processor())
        for rows in (own, pairs):
            assert rows.train[0]["images"][0].getpixel((0, 0)) == RED
            assert rows.eval[0]["images"][0].getpixel((0, 0)) == color


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=chat", "`task: chat` needs your own data: set `data.train`"),
        (
            "evaluation.metrics=[anls]",
            "`evaluation` only has an effect with your own data .* sets metrics",
        ),
        ("training.eval_strategy=steps", "`training.eval_strategy` needs your own data"),
    ],
)
def test_questions_about_the_built_in_scenes_have_no_values_of_own_data(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainingRun(load_recipe(find_preset("demo", "training"), [override]), tmp_path)
    with pytest.raises(ValueError, match=message):
        LoraRun(load_lora_recipe(find_preset("experts", "lora"), [override]), tmp_path)


CAPTIONS = [
    "task=captioning",
    "data.num_train=44",
    "data.num_heldout=11",
    "training.max_steps=2",
    "training.per_device_train_batch_size=4",
    "training.use_cpu=true",
    "training.eval_strategy=steps",
    "training.eval_steps=1",
    "evaluation.sample=2",
    "config.text_config.num_hidden_layers=1",
]


def test_captions_of_the_built_in_scenes(tmp_path):
    training = run(ROOT / "configuration/training/captioning.yaml", tmp_path, *CAPTIONS)
    assert training.model.config.text_config.num_hidden_layers == 1
    vocabulary = training.recipe.data["vocabulary"]
    pairs = scene_pairs(scenes("test", 11, grid=(2, 2), cell_size=16, vocabulary=vocabulary))
    metrics = training.evaluate()
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [prediction["references"] for prediction in predictions] == [[row["caption"]] for row in pairs]
    answers = [prediction["prediction"] for prediction in predictions]
    expected = score_answers(
        ["cider", "bleu", "rouge_l"], answers, [prediction["references"] for prediction in predictions]
    )
    assert metrics["eval"] == expected
    card = ModelCard.load(tmp_path / "model/README.md").data
    assert [(result.task_type, result.dataset_name) for result in card.eval_results] == [
        ("image-to-text", "scenes")
    ] * 3
    training.draw()
    question, image = training.report.example()
    assert (question, image) == ("Describe the image.", tmp_path / "example.png")
    assert PILImage.open(image).tobytes() == pairs[0]["image"].convert("RGB").tobytes()
    saved = load_recipe(tmp_path / "recipe.yaml")
    assert saved.config == {"text_config": {"num_hidden_layers": 1}}
    with pytest.raises(ValueError, match=r"`task: chat` needs your own data: set `data\.train`"):
        TrainingRun(load_recipe(tmp_path / "recipe.yaml", ["task=chat"]), tmp_path / "chat")
