"""`RetrievalMetrics` measures recall and median rank at every evaluation of any trainer."""

import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Image
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.data import RetrievalCollator
from modeling_sparse_moe_vlm.toolbox.evaluation import evaluate_retrieval, retrieval
from modeling_sparse_moe_vlm.toolbox.evaluation.retrieval import RetrievalRanks, rank_rows
from modeling_sparse_moe_vlm.toolbox.training import RetrievalMetrics, SparseMoeTrainer, retrieval_metrics
from tests.support.models import QUIET_TRAINING
from tests.support.processors import make_image, make_processor
from tests.support.retrieval import make_pairs, make_retrieval_model


def make_trainer(tmp_path, callbacks, trainer_class=Trainer, **arguments):
    defaults = {"output_dir": str(tmp_path), **QUIET_TRAINING, "max_steps": 1, "logging_steps": 1, "eval_steps": 1}
    defaults |= {"eval_strategy": "steps", "save_strategy": "no", "per_device_train_batch_size": 2}
    return trainer_class(
        model=make_retrieval_model(),
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_pairs(4),
        eval_dataset=make_pairs(2),
        data_collator=RetrievalCollator(make_processor()),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("as_dataset", [False, True])
def test_figures_are_those_of_the_sample(tmp_path, as_dataset):
    rows = make_pairs(7, captions=2)
    if as_dataset:
        rows = Dataset.from_list(rows).cast_column("image", Image())
    own = RetrievalMetrics(make_processor(), rows, num_samples=5, batch_size=2, embedding_size=16, seed=3)
    assert own.sample == sorted(random.Random(3).sample(range(7), 5)) != list(range(5))
    trainer = make_trainer(tmp_path, [own], learning_rate=0.0)
    trainer.train()
    chosen = [rows[number] for number in own.sample]
    expected = evaluate_retrieval(trainer.model, make_processor(), chosen, embedding_size=16)
    assert len(set(expected.values())) > 3
    assert expected != evaluate_retrieval(trainer.model, make_processor(), chosen)
    (entry,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {name: entry[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert own.measure(None, None, trainer.model.train()) == pytest.approx(expected)
    assert trainer.model.training
    assert "eval_text_to_image/median_rank" in trainer.evaluate()
    assert "recall" not in "".join(trainer.evaluate(metric_key_prefix="test"))


@pytest.mark.parametrize("trainer_class", [Trainer, pytest.param(SparseMoeTrainer, marks=pytest.mark.extensive)])
def test_early_stopping_and_the_best_checkpoint(tmp_path, monkeypatch, trainer_class):
    """The median rank of the first evaluation is the best, because the smallest rank is."""
    ranks = {1: 2, 2: 5, 3: 3}

    def scripted(*arguments, **options):
        return RetrievalRanks([ranks[trainer.state.global_step]], [1], [0], [0])

    monkeypatch.setattr(retrieval_metrics, "rank_rows", scripted)
    trainer = make_trainer(
        tmp_path,
        [EarlyStoppingCallback(early_stopping_patience=2), RetrievalMetrics(make_processor(), make_pairs(2))],
        trainer_class,
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="image_to_text/median_rank",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_the_smallest_median_rank_is_the_best(tmp_path):
    own = RetrievalMetrics(make_processor(), make_pairs(2))
    wrong = {"metric_for_best_model": "eval_text_to_image/median_rank"}
    message = "the best model has the smallest 'eval_text_to_image/median_rank': set `greater_is_better=False`"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [own], **wrong)
    trainer = make_trainer(tmp_path, [], **wrong)
    trainer.add_callback(own)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    make_trainer(tmp_path, [own], **wrong, greater_is_better=False)
    make_trainer(tmp_path, [own], metric_for_best_model="text_to_image/recall@1")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": iter([])}, TypeError, "`rows` must have a length"),
        ({"rows": []}, ValueError, "`rows` has no rows"),
        ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ({"rows": [*make_pairs(2), {"image": make_image()}]}, ValueError, "row 2 has no caption"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        RetrievalMetrics(**{"processor": make_processor(), "rows": make_pairs(2)} | change)


@pytest.mark.parametrize(("rank", "own_batches"), [(0, [[0, 1], [4]]), (1, [[2, 3]])])
def test_processes_share_the_rows(monkeypatch, rank, own_batches):
    """An image in the batches of both processes is one image. The order of the ranks is that of the rows."""
    model, processor, rows = make_retrieval_model(), make_processor(), make_pairs(5, captions=2)
    rows[1]["image_id"] = rows[3]["image_id"] = "same"
    expected = rank_rows(model, processor, rows, batch_size=2)
    assert expected.of_row == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert expected.of_image == [0, 0, 1, 1, 2, 2, 1, 1, 3, 3]
    assert len(expected.image_to_text) == 4
    embed_batch, read, gathered = retrieval._embed_batch, [], {}

    def embedded(*arguments):
        read.append(list(arguments[3]))
        return embed_batch(*arguments)

    def gather(of_all, mine):
        gathered[torch.distributed.get_rank()] = mine
        of_all[:] = gathered[0], gathered.get(1, mine)

    monkeypatch.setattr(retrieval, "_embed_batch", embedded)
    monkeypatch.setattr(retrieval, "is_one_of_several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for process in (1 - rank, rank):
        read.clear()
        monkeypatch.setattr(torch.distributed, "get_rank", lambda process=process: process)
        gathered.setdefault(0, [])
        ranks = rank_rows(model, processor, rows, batch_size=2, share=True)
    assert read == own_batches
    assert ranks == expected
    # Every process embeds all rows if it is not asked to share them, or if it has only a part of the model.
    read.clear()
    assert rank_rows(model, processor, rows, batch_size=2) == expected
    model.config.distributed_config = SimpleNamespace(tp_size=1)
    assert rank_rows(model, processor, rows, batch_size=2, share=True) == expected
    assert read == [[0, 1], [2, 3], [4]] * 2
