"""Supervised and preference tuning with TRL, on conversations with pictures."""

import pytest
import torch
from datasets import Dataset

from tests.support.processors import assistant, make_picture, make_processor, make_speaking_model, user

trl = pytest.importorskip("trl")

ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_length": None,
}


def changed_parameters(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("with_pictures", [True, False])
def test_sft(with_pictures, tmp_path):
    model, processor = make_speaking_model(router_aux_loss_coef=0.1), make_processor()
    # A processor tells a typed image token from a placeholder, a tokenizer alone does not.
    parts = [{"type": "image"}] if with_pictures else []
    text = "What is <image> here?" if with_pictures else "What is here?"
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
        assistant("A cat."),
    ]
    processor.tokenizer.chat_template = processor.chat_template
    columns = {"messages": [messages] * 4}
    if with_pictures:
        columns["images"] = [[make_picture(i)] for i in range(4)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(columns),
        processing_class=processor if with_pictures else processor.tokenizer,
    )
    before = snapshot(model)
    trainer.train()
    changed = changed_parameters(model, before)
    assert {"lm_head.weight", "model.language_model.layers.0.mlp.experts.gate_up_proj"} <= changed
    assert any("vision_tower" in name for name in changed) == with_pictures
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < log["loss"] < 20


def test_sft_adds_the_router_losses(arrangement, tmp_path):
    messages = [user("the cat"), assistant("A cat.")]
    logs = []
    for coefficient in (0.0, 1.0):
        model = make_speaking_model(expert_groups=arrangement, router_aux_loss_coef=coefficient)
        processor = make_processor()
        processor.tokenizer.chat_template = processor.chat_template
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS | {"max_steps": 1}),
            train_dataset=Dataset.from_dict({"messages": [messages] * 2}),
            processing_class=processor.tokenizer,
        )
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert logs[1]["aux_loss"] > 0
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(logs[1]["aux_loss"], rel=1e-3)


def test_dpo(tmp_path):
    model, processor = make_speaking_model(), make_processor()
    row = {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        "chosen": [assistant("A cat.")],
        "rejected": [assistant("A mat.")],
    }
    columns = {key: [value] * 2 for key, value in row.items()} | {"images": [[make_picture(i)] for i in range(2)]}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=make_speaking_model(),
        args=trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(columns),
        processing_class=processor,
    )
    before = snapshot(model)
    trainer.train()
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in changed_parameters(model, before)
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(0.693, abs=0.05)
