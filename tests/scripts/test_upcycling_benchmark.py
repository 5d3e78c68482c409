"""upcycling.py: its tasks, counts and comparisons, and the form of its report, with tiny sizes."""

import importlib.util
import math
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.demo import train_tokenizer
from tests.scripts.conftest import SCRIPTS

pytestmark = pytest.mark.extensive

COSTS = ("parameters", "flops_per_token", "seconds_per_step")
TASKS = "knowledge", "relations"


@pytest.fixture(scope="module")
def folder():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS / "benchmarks")
        yield SCRIPTS / "benchmarks"


@pytest.fixture(scope="module")
def tasks(folder):
    return _load(folder, "upcycling_tasks")


@pytest.fixture
def benchmark(folder):
    return _load(folder, "upcycling")


@pytest.fixture(scope="module")
def knowledge(tasks):
    return tasks.Knowledge(num_emoji=4)


@pytest.fixture(scope="module")
def relations(tasks):
    return tasks.Relations(num_scenes=220)


@pytest.fixture
def collator(tasks, knowledge, relations):
    return tasks.Collator(train_tokenizer([*knowledge.texts(), *relations.texts()], 400), image_seq_length=4)


def _load(folder, name):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up their module
    try:
        spec.loader.exec_module(module)
    finally:
        if name != "upcycling_tasks":
            del sys.modules[name]
    return module


def _same(first, second):
    return all(a[1:] == b[1:] and torch.equal(a.image, b.image) for a, b in zip(first, second, strict=True))


def test_kinds_of_knowledge_alternate_and_drawings_differ(knowledge):
    examples = knowledge.sample(400, random.Random(0))
    kinds = [example.kind for example in examples]
    assert [kinds.count(kind) for kind in ("name", "group", "keyword")] == [200, 100, 100]
    assert _same(examples, knowledge.sample(400, random.Random(0)))
    names = [example for example in examples if example.kind == "name"]
    assert {example.answer for example in names} == set(knowledge.names)
    assert len(knowledge.names) == 4
    for name in knowledge.names:
        drawings = [example.image for example in names if example.answer == name]
        assert len({drawing.numpy().tobytes() for drawing in drawings}) > 15
        assert all(drawing.shape == (3, 32, 32) and drawing.dtype == torch.uint8 for drawing in drawings)


def test_held_out_knowledge_contains_each_kind_once_and_stays_the_same(knowledge):
    examples = knowledge.held_out(9)
    assert [example.kind for example in examples] == ["name"] * 3 + ["group"] * 3 + ["keyword"] * 3
    assert len({example.answer for example in examples[:3]}) == 3
    assert _same(examples, knowledge.held_out(9))


def test_held_out_drawings_are_not_trained_on(knowledge):
    seen = {example.image.numpy().tobytes() for example in knowledge.sample(4000, random.Random(0))}
    held_out = knowledge.held_out(12)
    assert {example.question for example in held_out[:4]} == {"What is this emoji called?"}
    assert not seen & {example.image.numpy().tobytes() for example in held_out}


def test_relations_are_held_out_by_arrangement(tasks, relations):
    examples = relations.sample(50, random.Random(0))
    assert sorted(example.kind for example in examples) == sorted(tasks.RELATIONS * 10)
    held_out = relations.held_out(50)
    assert sorted(example.kind for example in held_out) == sorted(tasks.RELATIONS * 10)
    seen = {example.image.numpy().tobytes() for example in relations.sample(2000, random.Random(1))}
    assert not seen & {example.image.numpy().tobytes() for example in held_out}
    assert {example.image.shape for example in examples + held_out} == {(3, 32, 32)}


def test_a_batch_contains_every_task_and_is_the_same_for_the_same_seed(tasks, knowledge, relations, collator):
    def draw(seed):
        return list(tasks.batches({knowledge: 4, relations: 2}, collator, 2, seed))

    first, again, other = draw("a"), draw("a"), draw("b")
    assert len(first) == 2
    assert first[0]["pixel_values"].shape == (6, 3, 32, 32)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])


def test_targets_are_the_answer_and_its_end(tasks, collator):
    tokenizer = collator._tokenizer
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    image[:, 0, 0] = 0
    examples = [tasks.Example(image, "Where?", "here", "x"), tasks.Example(image, "Where is it?", "yes", "x")]
    batch = collator(examples)
    ids = [tokenizer(text)["input_ids"] for text in ("Where?", "here", "Where is it?", "yes")]
    rows = [[1] * 4 + ids[0] + [2] + ids[1] + [3], [1] * 4 + ids[2] + [2] + ids[3] + [3]]
    targets = [[-100] * (5 + len(ids[0])) + ids[1] + [3], [-100] * (5 + len(ids[2])) + ids[3] + [3]]
    length = max(map(len, rows))
    assert len({len(row) for row in rows}) == 2
    assert batch["input_ids"].tolist() == [row + [0] * (length - len(row)) for row in rows]
    assert batch["labels"].tolist() == [row + [-100] * (length - len(row)) for row in targets]
    assert batch["attention_mask"].tolist() == [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    assert batch["pixel_values"][0, :, 0, :2].tolist() == [[-1.0, 1.0]] * 3


def test_an_answer_is_right_if_all_its_tokens_are(benchmark):
    labels = torch.tensor([[-100, 1, 2], [-100, 1, 2], [-100, 2, -100]])
    logits = torch.zeros(3, 3, 4)
    for row, guesses in enumerate([[1, 2], [1, 3], [2, 0]]):  # right; its end is wrong; right
        for place, guess in enumerate(guesses):
            logits[row, place, guess] = 1.0
    batch = {"input_ids": torch.zeros(3, 3), "labels": labels}
    counts = benchmark.count(lambda input_ids: SimpleNamespace(logits=logits), batch)
    assert counts[:3] == (3, 2, 5)
    score = benchmark.Score.of([counts, benchmark.Counts(answers=1, right=1, tokens=1, nats=0.5)])
    assert score.accuracy == 75
    likely = math.log(3 + math.e)  # of logits 0, 0, 0, 1
    assert score.cross_entropy == pytest.approx((4 * (likely - 1) + likely + 0.5) / 6)


def test_flops_are_those_of_the_matrix_products(benchmark):
    model = benchmark.make_dense(vocab_size=300, image_token_id=1)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    ids = torch.randint(4, 300, (2, 10))
    ids[:, :4] = 1
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32), "labels": ids}
    d, i, layers = (benchmark.DECODER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    v, w, depth = (benchmark.VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    decoder = layers * (4 * d * d + 3 * d * i + 2 * 10 * d) + 300 * d  # multiplications per token
    tower = depth * (4 * v * v + 2 * v * w + 2 * 4 * v) + v * d + d * d
    patches = 3 * benchmark.PATCH_SIZE**2 * v
    # Backward costs twice as much as forward; the pixels need no gradient.
    flops = 2 * (3 * 20 * decoder + 3 * 8 * tower + 2 * 8 * patches)
    assert benchmark.flops_per_token(model, batch) == flops / 18


def test_budgets_are_read_between_evaluations(benchmark):
    points = _points(benchmark, [(0, 0.0), (10, 4.0), (20, 6.0)])
    read = [benchmark.at_budget(points, "tokens", spent, "relations", "accuracy") for spent in (0, 5, 10, 15, 20, 30)]
    assert read == [0, 2, 4, 5, 6, 6]


def _points(benchmark, accuracies, flops=1.0, seconds=1.0):
    return [
        benchmark.Point(tokens, tokens, flops * tokens, seconds * tokens, {"relations": benchmark.Score(accuracy, 1.0)})
        for tokens, accuracy in accuracies
    ]


def test_runs_are_compared_at_the_costs_of_the_cheaper_one(benchmark):
    def run(last, flops, seconds):
        return SimpleNamespace(points=_points(benchmark, [(0, 10.0), (8, last)], flops, seconds))

    by_seed = [
        {"dense": run(last, 1.0, 1.0), "copy isolated": run(last + 20 + seed, 2.0, 4.0)}
        for seed, last in enumerate([50.0, 30.0])
    ]
    rows = benchmark.compare(by_seed, "copy isolated", "relations", "accuracy")
    start, tokens, flops, seconds = rows
    assert [row["case"] for row in rows] == [
        f"copy isolated, relations, {at}" for at in ("start", "equal tokens", "equal flops", "equal seconds")
    ]
    assert (start["ours"], start["peer"], start["low"], start["high"]) == (10, 10, 0, 0)
    assert (tokens["ours"], tokens["peer"]) == (60.5, 40)
    assert tokens["ours_by_seed"] == [70, 51]
    assert tokens["peer_by_seed"] == [50, 30]
    assert tokens["ratio"] == 60.5 / 40
    assert (tokens["low"], tokens["high"]) == pytest.approx((20.5 - 12.706 * 0.5, 20.5 + 12.706 * 0.5))
    assert (flops["ours"], flops["peer"]) == ((40 + 30.5) / 2, 40)
    assert (seconds["ours"], seconds["peer"]) == ((25 + 20.25) / 2, 40)
    assert all(row["bar"] is None and row["holds"] for row in rows)


def test_interval(benchmark):
    assert benchmark.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert benchmark.interval([1.0]) == (None, None)


def test_a_start_with_other_outputs_misses_the_bar(benchmark):
    rows = benchmark.start_rows({"copy isolated": [(1e-6, 1.0), (3e-5, 2.0)], "residual hybrid": [(0.0, 1.0)]})
    assert [(row["ours"], row["peer"], row["ratio"], row["holds"]) for row in rows] == [
        (3e-5, 2.0, 1.5e-5, False),
        (0.0, 1.0, 0.0, True),
    ]
    assert benchmark.row("no figure to compare with", "accuracy", 1.0, 0.0)["ratio"] is None


@pytest.mark.slow
def test_report(benchmark, load_gpu, monkeypatch, capsys):
    sizes = replace(benchmark.QUICK, num_emoji=8, num_held_out=6, steps=2, pretraining_steps=2)
    monkeypatch.setattr(benchmark, "QUICK", sizes)
    monkeypatch.setattr(sys, "argv", ["upcycling.py", "--quick", "--json"])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)

    printed = capsys.readouterr().out
    assert "These are the sizes of a quick test: the figures are not meaningful." in printed
    result = load_gpu().read_result(printed)
    assert result.keys() == {"benchmark", "device", "versions", "rows", "holds", "sizes", "curves"}
    assert (result["benchmark"], result["holds"]) == ("upcycling", True)
    rows = {(row["case"], row["metric"]): row for row in result["rows"]}
    for arm in benchmark.ARMS:
        assert rows[f"{arm}, start", "logits_difference"]["ratio"] < 1e-5
        for part in benchmark.PARTS:
            start = rows[f"{arm}, {part}, start", "cross_entropy"]
            assert start["ours"] == pytest.approx(start["peer"], rel=1e-5)
            for budget in benchmark.BUDGETS:
                assert rows[f"{arm}, {part}, equal {budget}", "accuracy"]["low"] is not None
    curves = {(point["seed"], point["arm"], point["step"]): point for point in result["curves"]}
    assert set(curves) == {
        (seed, arm, step) for seed in (0, 1) for arm in ("dense", *benchmark.ARMS) for step in (0, 1, 2)
    }
    for (seed, _, step), point in curves.items():
        assert point["tokens"] == curves[seed, "dense", step]["tokens"], "all see the same batches"
    _check_costs(benchmark, rows)


def _check_costs(benchmark, rows):
    d, i, layers = (benchmark.DECODER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    block = 3 * d * i
    isolated, hybrid = (
        {metric: rows[arm, metric] for metric in ("parameters", "flops_per_token")} for arm in benchmark.ARMS
    )
    more = [each["parameters"]["ours"] - each["parameters"]["peer"] for each in (isolated, hybrid)]
    # Eight experts instead of one block; two blocks and eight experts of half their width.
    assert more == [layers * (7 * block + 8 * d), layers * (5 * block + 8 * d)]
    for each in (isolated, hybrid):
        assert each["flops_per_token"]["ours"] > each["flops_per_token"]["peer"] + 6 * layers * block
