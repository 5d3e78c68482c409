"""Rows packed into sequences get the same logits, losses and gradients as padded rows."""

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.data.packing import RowPacker
from tests.support import models, upcycled
from tests.support.packed_rows import BASES, make_base, make_packer, make_rows

ALL_LOSSES = {
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.1,
    "router_local_entropy_coef": 0.1,
    "router_global_entropy_coef": 0.1,
}
SEQUENCES = [[2], [4, 1, 0], [3, 5]]  # the last one has no images
OURS = {
    "hybrid": {},
    "isolated": {"expert_groups": "isolated"},
    "joint with pools": {"expert_groups": "joint", "expert_pool": [0, 0]},
}


def padded(packer: RowPacker, rows: list[dict[str, torch.Tensor]]) -> dict:
    """Returns a padded batch, with an attention mask and without positions."""
    batch = dict(packer.pack(rows, [[number] for number in range(len(rows))]))
    del batch["position_ids"]
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    return batch | {"attention_mask": mask.long()}


def run(model, batch):
    """Returns the outputs and the gradients of a training step."""
    model.zero_grad()
    model.train()
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits_of_rows(logits, rows, sequences, separators=False):
    """Returns the logits of every row, in the order of the rows."""
    found = {}
    for number, sequence in enumerate(sequences):
        start = 0
        for row in sequence:
            length = rows[row]["input_ids"].shape[1]
            found[row] = logits[number, start : start + length]
            start += length + separators
    return [found[row] for row in range(len(rows))]


def assert_close(found, expected, name):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")


def assert_packed_equals_padded(model, name, rows=None):
    rows = make_rows(name) if rows is None else rows
    packer = make_packer(model, name)
    batch = packer.pack(rows, SEQUENCES)
    packed, gradients = run(model, batch)
    outputs, expected_gradients = run(model, padded(packer, rows))

    unseparated = batch["position_ids"].clone()
    (unseparated[0] if unseparated.dim() == 3 else unseparated)[:] = torch.arange(unseparated.shape[-1])
    with torch.no_grad():
        mixed = logits_of_rows(
            model(**{**batch, "position_ids": unseparated}).logits, rows, SEQUENCES, packer.separators
        )

    found = logits_of_rows(packed.logits, rows, SEQUENCES, packer.separators)
    for number, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        assert_close(found[number], outputs.logits[number, :length], f"row {number} and the padded batch")
        with torch.no_grad():
            alone = model(**{key: value for key, value in row.items() if key != "labels"}).logits[0]
        assert_close(found[number], alone, f"row {number} on its own")
        if number in (1, 0, 5):  # rows after others
            assert (mixed[number] - alone).abs().max() > 0.1, "without separation, other rows must change the logits"
    assert_close(packed.loss, outputs.loss, "loss")
    for loss in ("aux_loss", "z_loss", "router_loss", "aux_loss_by_modality"):
        if outputs.get(loss) is not None:
            assert_close(packed[loss], outputs[loss], loss)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for key, gradient in gradients.items():
        assert (gradient - expected_gradients[key]).abs().max() < 1e-5 * largest, key


@pytest.mark.parametrize("groups", OURS)
def test_our_models(groups):
    model = models.make_model(output_router_logits=True, **ALL_LOSSES, **OURS[groups])
    assert_packed_equals_padded(model, "ours")


def test_our_models_with_eager_attention():
    model = models.make_model(output_router_logits=True)
    model.set_attn_implementation("eager")
    assert_packed_equals_padded(model, "ours")


def test_our_models_with_distributed_attention():
    model = models.make_model(alpha_init=0.8, beta_init=0.2, learned_modality_priors=True)
    assert_packed_equals_padded(model, "ours")


@pytest.mark.parametrize("name", BASES)
def test_models_of_transformers(name):
    assert_packed_equals_padded(make_base(name), name)


@pytest.mark.parametrize("name", BASES)
def test_upcycled_models(name):
    model = upcycled.make_upcycled(name, "hybrid", dense=make_base(name), output_router_logits=True, **ALL_LOSSES)
    assert_packed_equals_padded(model, name)
