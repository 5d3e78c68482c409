"""Batches whose own rows are all bad: the run continues, and no row trains twice."""

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.data.repeated_rows import CollatorForTraining, RepeatedRow
from tests.support.own_data import figures, make_trainer, tensors, write_own_data
from tests.support.processors import make_speaking_model

SETTINGS = {
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
    "router": "sigmoid",
    "router_bias_update_rate": 0.05,
}


def train(data, folder, max_steps: int, before=None, **arguments):
    trainer = make_trainer(
        data,
        folder,
        make_speaking_model(**SETTINGS),
        shuffle=False,
        per_device_train_batch_size=1,
        logging_steps=1,
        max_steps=max_steps,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        **arguments,
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    if before is not None:
        before()
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_without_good_rows_has_no_weight(streaming, packing, tmp_path):
    def break_images():
        for number in (1, 2):
            (tmp_path / f"broken/{number}.png").write_bytes(b"not an image")

    kwargs = {"streaming": streaming, "packing": packing}
    data = write_own_data(tmp_path / "broken", 5, bad=(), without_image=())
    broken = train(data, tmp_path / "run", 5, break_images, **kwargs)
    good = write_own_data(tmp_path / "good", 5, bad=(), without_image=())
    (good / "1.jsonl").write_text((data / "1.jsonl").read_text())
    (good / "0.jsonl").write_text((data / "0.jsonl").read_text().splitlines()[0] + "\n")
    expected = train(good, tmp_path / "expected", 3, **kwargs)

    losses = [entry["loss"] for entry in figures(broken)[:-1]]
    whole = [entry["loss"] for entry in figures(expected)[:-1]]
    assert losses == [whole[0], 0.0, 0.0, *whole[1:]]
    for name, tensor in tensors(broken).items():
        assert torch.equal(tensor, tensors(expected)[name]), name
    skipped = broken.train_dataset.reader.skipped.entries()
    assert [(entry["row"], entry["kind"]) for entry in skipped] == [(1, "broken image"), (2, "broken image")]


def collate(rows):
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1]]),
        "labels": torch.tensor([[-100, 6, 7]]),
    }
    return batch if "positions" not in rows[0] else batch | {"position_ids": torch.arange(6).view(2, 1, 3)}


def test_only_the_batch_of_a_repeated_row_has_no_targets():
    row = {"text": "a"}
    for rows in ([row], [RepeatedRow(row), row]):
        batch = CollatorForTraining(collate, True)(rows)
        assert {name: tensor.tolist() for name, tensor in batch.items()} == {
            "input_ids": [[5, 6, 7]],
            "attention_mask": [[1, 1, 1]],
            "labels": [[-100, 6, 7]],
        }
    dense = CollatorForTraining(collate, False)([RepeatedRow(row)])
    assert {name: tensor.tolist() for name, tensor in dense.items()} == {
        "input_ids": [[5, 6, 7]],
        "attention_mask": [[1, 1, 1]],
        "labels": [[-100, -100, -100]],
    }
    sparse = CollatorForTraining(collate, True)([RepeatedRow(row)])
    assert sparse.pop("use_cache") is False
    assert {name: tensor.tolist() for name, tensor in sparse.items()} == {
        "input_ids": [[5, 6, 7]],
        "position_ids": [[-1, -1, -1]],
        "labels": [[-100, -100, -100]],
    }
    packed = CollatorForTraining(collate, True)([RepeatedRow(row | {"positions": 2})])
    assert packed["position_ids"].tolist() == [[[-1, -1, -1]], [[-1, -1, -1]]]
    assert CollatorForTraining(lambda rows: {"ids": rows}, True)([RepeatedRow(row)]) == {"ids": [row]}


@pytest.mark.parametrize(
    ("takes_number", "loss_function", "wraps"), [(True, None, True), (False, None, False), (False, max, True)]
)
def test_a_loss_that_is_a_mean_over_the_batch_keeps_the_repeated_row(takes_number, loss_function, wraps, tmp_path):
    trainer = make_trainer(write_own_data(tmp_path), tmp_path / "run")
    trainer.model_accepts_loss_kwargs, trainer.compute_loss_func = takes_number, loss_function
    collator = trainer.get_train_dataloader().collate_fn
    assert isinstance(collator, CollatorForTraining) == wraps
    assert not wraps or (collator.collator is trainer.data_collator and collator.marks_padding)
