"""Factored adapters of experts in Trainer, in TRL and in the adapter methods of Transformers."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.expert_lora import ExpertLoraConfig, factor_expert_lora, load_expert_lora
from modeling_sparse_moe_vlm.toolbox.expert_lora.adapted_layer import FactoredExpertsLayer, run_factored
from modeling_sparse_moe_vlm.toolbox.expert_modules import is_experts
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.in_tree_moe import (
    adapt,
    adapter_tensors,
    assert_equal,
    experts_of,
    make_inputs,
    make_model,
    randomise,
)
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, user

ARGUMENTS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 0.05,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "remove_unused_columns": False,
}
CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}


@torch.no_grad()
def logits_of(model, inputs):
    return model.eval()(**inputs).logits


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["isolated", "joint"])
def test_trainer(name, tmp_path):
    """The losses equal those of PEFT, with and without checkpointing. Only the adapter is trained and saved."""
    losses, logits = [], []
    for factored, checkpointing in ((False, False), (True, False), (True, True)):
        model = make_model(name)
        frozen = {key: weight.clone() for key, weight in model.state_dict().items()}
        adapted = adapt(model)
        if factored:
            factor_expert_lora(adapted)
        arguments = ARGUMENTS | {"gradient_checkpointing": checkpointing, "optim": "sgd"}
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(output_dir=str(tmp_path / "run"), **arguments),
            train_dataset=make_rows(),
            data_collator=collate,
        )
        trainer.train()
        losses.append(losses_of(trainer))
        logits.append(logits_of(adapted, make_inputs(model)))
        for key, weight in adapted.get_base_model().state_dict().items():
            if "lora_" not in key:
                assert torch.equal(weight, frozen[key.replace(".base_layer", "")])
        trainer.save_model(str(tmp_path / "adapter"))
    assert losses[0][-1] != losses[0][0]
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-4)
        assert_equal(logits[other], logits[0], 1e-3)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    inputs = make_inputs(make_model(name))
    assert_equal(logits_of(PeftModel.from_pretrained(make_model(name), tmp_path / "adapter"), inputs), logits[2])
    assert_equal(logits_of(load_expert_lora(make_model(name), tmp_path / "adapter"), inputs), logits[2])


def test_trainer_resumes(tmp_path):
    """Training resumed from a checkpoint equals uninterrupted training."""

    def run(steps: int, **options):
        adapted = factor_expert_lora(adapt(make_model("joint")))
        arguments = ARGUMENTS | {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        arguments |= {"lr_scheduler_type": "constant"}
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(output_dir=str(tmp_path), **arguments),
            train_dataset=make_rows(),
            data_collator=collate,
        )
        trainer.train(**options)
        return {name: tensor.detach().clone() for name, tensor in adapter_tensors(adapted).items()}

    straight = run(4)
    resumed = run(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(resumed, straight, 1e-4)


@pytest.mark.parametrize("given", ["config", "model"])
def test_sft(given, tmp_path):
    """TRL adds the adapter itself, which is factored before training, or gets a model with an adapter."""
    trl = pytest.importorskip("trl")
    model, processor = make_speaking_model(), make_processor()
    config = ExpertLoraConfig(**CONFIG, lora_dropout=0.1)
    run_factored(config, [module for module in model.modules() if is_experts(module)])
    parts = [make_image(), "What?"]
    messages = [user(*parts), assistant("A cat.")]
    messages[0]["content"][0] = {"type": "image"}
    columns = {"messages": [messages] * 4, "images": [[make_image(i)] for i in range(4)]}
    arguments = {key: value for key, value in ARGUMENTS.items() if key != "remove_unused_columns"}
    trainer = trl.SFTTrainer(
        model=model if given == "config" else get_peft_model(model, config),
        args=trl.SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=None, **arguments),
        train_dataset=Dataset.from_dict(columns),
        processing_class=processor,
        peft_config=config if given == "config" else None,
    )
    adapted = trainer.model
    assert sum(isinstance(module, FactoredExpertsLayer) for module in adapted.modules()) == 2 * len(experts_of(model))
    before = {name: tensor.detach().clone() for name, tensor in adapter_tensors(adapted).items()}
    trainer.train()
    after = adapter_tensors(adapted)
    assert len(before) == 4 * len(experts_of(model))
    assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = make_inputs(model)
    expected = logits_of(adapted, inputs)
    assert_equal(logits_of(PeftModel.from_pretrained(make_speaking_model(), tmp_path / "adapter"), inputs), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated"])
def test_adapters_of_transformers(name, tmp_path, monkeypatch):
    """`add_adapter`, `load_adapter`, switching, disabling and saving without a `PeftModel`."""
    # Transformers 5.24 requires PEFT 0.22, which is newer than the installed version.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.19.0")
    model = make_model(name)
    inputs = make_inputs(model)
    base = logits_of(model, inputs)
    model.add_adapter(LoraConfig(**CONFIG))
    randomise(model)
    expected = logits_of(model, inputs)
    assert (expected - base).abs().max() > 0.1 * base.abs().max()
    factor_expert_lora(model)
    assert sum(isinstance(module, FactoredExpertsLayer) for module in model.modules()) == 2 * len(experts_of(model))
    assert_equal(logits_of(model, inputs), expected)
    model.save_pretrained(tmp_path / "adapter")

    loaded = make_model(name)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_equal(logits_of(loaded, inputs), expected)
    assert_equal(logits_of(factor_expert_lora(loaded), inputs), expected)
    loaded.add_adapter(LoraConfig(**CONFIG | {"r": 2}), "second")
    randomise(loaded, seed=7, adapter="second")
    second = logits_of(loaded, inputs)
    assert (second - expected).abs().max() > 0.1 * base.abs().max()
    loaded.set_adapter("default")
    assert_equal(logits_of(loaded, inputs), expected)
    loaded.disable_adapters()
    assert_equal(logits_of(loaded, inputs), base)
    loaded.enable_adapters()
    loaded.set_adapter(["default", "second"])
    both = logits_of(loaded, inputs)
    assert min((both - other).abs().max() for other in (expected, second)) > 0.05 * base.abs().max()
    loaded.delete_adapter("second")
    loaded.set_adapter("default")
    assert_equal(logits_of(loaded, inputs), expected)


def test_a_second_adapter_by_peft(tmp_path):
    """`PeftModel.load_adapter`, and deleting, combining and merging adapters."""
    adapt(make_model("qwen3_moe"), seed=9).save_pretrained(tmp_path)
    adapted = factor_expert_lora(adapt(make_model("qwen3_moe"))).eval()
    inputs = make_inputs(adapted.get_base_model())
    first = logits_of(adapted, inputs)
    adapted.load_adapter(tmp_path, "second")
    adapted.set_adapter("second")
    second = logits_of(adapted, inputs)
    assert_equal(second, logits_of(load_expert_lora(make_model("qwen3_moe"), tmp_path), inputs))
    adapted = load_expert_lora(adapted, tmp_path, "third")
    adapted.set_adapter("third")
    assert_equal(logits_of(adapted, inputs), second)
    adapted.delete_adapter("third")
    adapted.set_adapter("default")
    assert_equal(logits_of(adapted, inputs), first)
    adapted.merge_adapter(["second"])
    assert_equal(logits_of(adapted, inputs), second, 2e-5)
    adapted.unmerge_adapter()
    assert_equal(logits_of(adapted, inputs), first, 2e-5)


@torch.no_grad()
def test_hotswapping(tmp_path):
    """PEFT writes the values of the other adapter through `.data`, which does not change the version of the tensors."""
    adapt(make_model("qwen3_moe"), seed=9).save_pretrained(tmp_path)
    adapted = factor_expert_lora(adapt(make_model("qwen3_moe"))).eval()
    inputs = make_inputs(adapted.get_base_model())
    short = {key: value[:1, :3] for key, value in inputs.items()}
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    logits, tokens = logits_of(adapted, inputs), adapted.generate(**short, **greedy)
    hotswap_adapter(adapted, str(tmp_path), "default", torch_device="cpu")
    fresh = load_expert_lora(make_model("qwen3_moe"), tmp_path)
    expected, expected_tokens = logits_of(fresh, inputs), fresh.generate(**short, **greedy)
    assert (logits - expected).abs().max() > 0.1 * expected.abs().max()
    assert not torch.equal(tokens, expected_tokens)
    assert torch.equal(adapted.generate(**short, **greedy), expected_tokens)
    assert_equal(logits_of(adapted, inputs), expected)
