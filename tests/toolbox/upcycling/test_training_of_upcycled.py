"""Training of upcycled models: router losses in trainers of every kind, and text that does not change."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm.losses import router_losses, share_of_batch
from modeling_sparse_moe_vlm.toolbox.expert_modules import sparse_blocks
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, freeze_text
from tests.integration.test_trainer import Gradients
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING
from tests.support.upcycled import KINDS, make_dense, make_inputs, make_rows, make_upcycled

# The z-loss is a mean over tokens. It is the same for any micro-batches with equally many tokens per target.
LOSSES = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05}


def train(model, tmp_path, kind="llava", trainer_class=Trainer, rows=None, **arguments):
    gradients = Gradients()
    defaults = {
        "output_dir": str(tmp_path),
        **QUIET_TRAINING,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
    }
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_rows(kind) if rows is None else rows,
        data_collator=collate,
        callbacks=[gradients],
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return trainer, gradients


def loss_by_hand(model, batch, num_targets: int | None = None) -> torch.Tensor:
    """Returns the language modeling loss of the logits, and the router losses of the inputs of the routers."""
    config, given = model.config.experts_config, []
    handles = [
        block.gate.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        for block in sparse_blocks(model).values()
    ]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, output_router_logits=False).logits
    for handle in handles:
        handle.remove()
    targets = batch["labels"][:, 1:]
    language = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    language = language / ((targets != -100).sum() if num_targets is None else num_targets)
    ids = batch["mm_token_type_ids"]
    router_logits = []
    for block, states in zip(sparse_blocks(model).values(), given, strict=True):
        groups = config.layer_expert_groups(block.layer_idx, always_on=False)
        serves = torch.tensor(
            [[group.serves(name) for group in groups for _ in range(group.num_experts)] for name in config.modalities]
        )
        scores = states @ block.gate.weight.T
        router_logits.append(scores.masked_fill(~serves[ids.flatten()], -torch.inf))
    losses = router_losses(config, router_logits, ids, batch["attention_mask"])
    return language + share_of_batch(batch["labels"], num_targets) * losses.total(config)


@pytest.mark.parametrize("groups", ["hybrid", "joint", "isolated"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_has_the_router_losses_of_real_tokens(kind, groups):
    model = make_upcycled(kind, groups, **LOSSES)
    batch = collate(make_rows(kind))
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, loss_by_hand(model, batch))
    plain = model(**batch, output_router_logits=False)
    assert "router_logits" not in plain
    config = model.config.experts_config
    expected = config.router_aux_loss_coef * outputs.aux_loss + config.router_z_loss_coef * outputs.z_loss
    torch.testing.assert_close(outputs.router_loss, expected)
    torch.testing.assert_close(outputs.loss - plain.loss, outputs.router_loss)
    assert outputs.router_loss > 0.1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_accumulated_batches(kind, checkpointing, tmp_path):
    """
    The language modeling loss over all targets, and the router losses of every part by its share. `Trainer` does not
    tell a Qwen3-VL how many targets there are: it gets the mean over the parts.
    """
    rows = make_rows(kind)
    parts = [collate(rows[start : start + 2]) for start in range(0, 8, 2)]
    num_targets = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    by_hand = make_upcycled(kind, "hybrid", **LOSSES).train()
    if kind == "qwen3_vl":
        (sum(loss_by_hand(by_hand, part) for part in parts) / len(parts)).backward()
    else:
        sum(loss_by_hand(by_hand, part, num_targets) for part in parts).backward()
    model = make_upcycled(kind, "hybrid", **LOSSES)
    _, gradients = train(
        model,
        tmp_path,
        kind,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=checkpointing,
        learning_rate=0.0,
    )
    (step,) = gradients.steps
    expected = {name: value.grad for name, value in by_hand.named_parameters() if value.grad is not None}
    assert step.keys() == expected.keys()
    assert any(name.endswith("gate.weight") for name in step)
    for name, gradient in step.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_checkpoints_of_training_have_no_settings_of_training(tmp_path):
    model = make_upcycled("llava", "hybrid", **LOSSES)
    trainer, _ = train(model, tmp_path, trainer_class=SparseMoeTrainer, save_strategy="steps", save_steps=1)
    saved = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    assert saved["experts_config"]["output_router_logits"] is False
    assert saved["experts_config"]["router_z_loss_coef"] == 0.05
    assert model.config.experts_config.output_router_logits
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"aux_loss", "z_loss", "aux_loss_text", "aux_loss_image"} <= set(log)


def test_training_resumes_from_a_checkpoint(tmp_path):
    """The state dict that `Trainer` reads contains the experts one by one."""
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    whole = make_upcycled("llava", "isolated", **LOSSES)
    train(whole, tmp_path / "whole", trainer_class=SparseMoeTrainer, **fields)
    again = make_upcycled("llava", "isolated", seed=1, **LOSSES)
    trainer = SparseMoeTrainer(
        model=again,
        args=TrainingArguments(
            output_dir=str(tmp_path / "whole"),
            **QUIET_TRAINING,
            max_grad_norm=0.0,
            per_device_train_batch_size=8,
            **fields,
        ),
        train_dataset=make_rows("llava"),
        data_collator=collate,
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_own_losses_get_the_router_losses(tmp_path):
    """Own losses are those that trainers compute outside of the model."""

    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.new_tensor(2.0)

    model = make_upcycled("llava", "joint", **LOSSES)
    batch = collate(make_rows("llava"))
    expected = 2.0 + model(**batch).router_loss.item()
    trainer = SparseMoeTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), **QUIET_TRAINING, max_steps=1, logging_steps=1, learning_rate=0.0
        ),
        train_dataset=make_rows("llava"),
        data_collator=collate,
        compute_loss_func=own_loss,
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------ text does not change


@torch.no_grad()
def read(model, kind, images: bool) -> torch.Tensor:
    return model.eval()(**make_inputs(kind, images=images)).logits


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_bit_identical_after_training_on_images(kind, layers, tmp_path):
    model = make_upcycled(kind, "isolated", **LOSSES, **({} if layers is None else {"layers": layers}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    text, images = read(model, kind, False), read(model, kind, True)
    handle = freeze_text(model)
    train(model, tmp_path, kind, max_steps=4, learning_rate=0.02, weight_decay=0.1)
    handle.remove()
    assert torch.equal(read(model, kind, False), text)
    assert (read(model, kind, True) - images).abs().max() > 1e-2, "outputs for images change"
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    of_images = ("vision_tower", "multi_modal_projector", "visual", ".experts.image.")
    expected = {name for name in before if name.endswith("mlp.gate.weight") or any(part in name for part in of_images)}
    # A CLIP tower has weights that do not affect its hidden states. A Qwen tower has positions for larger images.
    assert changed <= expected
    assert not [name for name in expected - changed if "mlp." in name and "vision" not in name and "visual" not in name]
    for name in (name for name in changed if name.endswith("mlp.gate.weight")):
        rows = (model.get_parameter(name) != before[name]).any(dim=1)
        assert rows.tolist() == [False] * 4 + [True] * 4


def test_groups_that_share_experts_with_text_are_refused():
    with pytest.raises(ValueError, match=r"share experts between text and other modalities: \{'joint'"):
        freeze_text(make_upcycled("llava", "hybrid"))


def test_dense_models_train_as_before(tmp_path):
    """`SparseMoeTrainer` does not affect models of the library."""
    trainer, _ = train(make_dense("llava"), tmp_path, trainer_class=SparseMoeTrainer)
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "aux_loss" not in log
