"""Supervised fine-tuning of upcycled models with TRL, with the router losses of the model."""

import peft
import pytest
import torch
from datasets import Dataset

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.expert_modules import sparse_blocks
from tests.integration.test_trl import ARGUMENTS, COEFFICIENTS, rows_with_images
from tests.support.processors import assistant, make_processor, user
from tests.support.upcycled import make_speaking

trl = pytest.importorskip("trl")


def train_sft(kind, model, tmp_path, **kwargs):
    """Runs one step that changes nothing. Returns the trainer, its log and the batch."""
    processor = make_processor()
    processor.tokenizer.chat_template = processor.chat_template
    rows = Dataset.from_dict({"messages": [[user("the cat"), assistant("A cat.")]] * 2})
    arguments = ARGUMENTS | {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **arguments | kwargs.pop("arguments", {})),
        train_dataset=rows if kind == "llama" else rows_with_images(),
        processing_class=processor.tokenizer if kind == "llama" else processor,
        **kwargs,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    return trainer, next(entry for entry in trainer.state.log_history if "loss" in entry), batch


def own_outputs(model, batch, wanted: bool = True):
    """Returns the outputs of the forward of the model's class for a batch."""
    model.train()
    return type(model).forward(model, **batch, output_router_logits=wanted)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_sft_trains_with_the_router_losses_of_the_model(kind, coefficients, tmp_path):
    model = make_speaking(kind, **COEFFICIENTS[coefficients])
    _, log, batch = train_sft(kind, model, tmp_path)
    own, plain = own_outputs(model, batch), own_outputs(model, batch, wanted=False)
    assert log["loss"] == pytest.approx(own.loss.item(), rel=1e-4)
    assert abs(log["loss"] - plain.loss.item()) > 0.01
    coefficient = model.config.experts_config.router_aux_loss_coef
    assert coefficient * log["aux_loss"] == pytest.approx((own.loss - plain.loss).item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_sft_gives_routers_the_gradients_of_the_models_own_loss(kind, tmp_path):
    kept = {}
    model = make_speaking(kind, **COEFFICIENTS["z-loss"])
    for name, block in sparse_blocks(model).items():
        block.gate.weight.register_hook(lambda gradient, name=name: kept.setdefault(name, gradient.clone()))
    _, _, batch = train_sft(kind, model, tmp_path)
    trained = dict(kept)
    assert len(trained) == 2
    kept.clear()
    own_outputs(model, batch).loss.backward()
    for name, gradient in kept.items():
        torch.testing.assert_close(trained[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_sft_of_adapters_on_experts(kind, tmp_path):
    model = make_speaking(kind, "joint", **COEFFICIENTS["balancing"])
    trainer, log, batch = train_sft(kind, model, tmp_path, peft_config=expert_lora_config(model, r=2))
    assert isinstance(trainer.model, peft.PeftModel)
    own = own_outputs(trainer.model.get_base_model(), batch)
    assert log["loss"] == pytest.approx(own.loss.item(), rel=1e-4)


def test_a_router_loss_that_trl_would_leave_out_is_an_error(tmp_path):
    model = make_speaking("llava", router_aux_loss_coef=0.0, router_z_loss_coef=0.1)
    with pytest.raises(ValueError, match="`router_z_loss_coef` would have no effect"):
        train_sft("llava", model, tmp_path)
