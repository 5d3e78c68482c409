"""bitsandbytes and torchao on routed experts, of our architecture and of upcycled models, and QLoRA on experts."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, TorchAoConfig, Trainer, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.expert_modules import sparse_blocks
from tests.support import in_tree_models, upcycled
from tests.support.models import QUIET_TRAINING, make_inputs, make_model

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
# Of linear layers. The others have a few columns, which kernels of 4 bits do not support.
OTHERS = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def make_ours():
    return make_model(expert_groups="hybrid", **SIZES)


def make_upcycled():
    torch.manual_seed(0)
    text = in_tree_models.TEXT | SIZES | {"head_dim": 16}
    dense = in_tree_models.prepare(in_tree_models.make_llava(LlamaConfig(**text)))
    return upcycled.make_upcycled(dense=dense)


MODELS = {"ours": (make_ours, make_inputs), "upcycled": (make_upcycled, upcycled.make_inputs)}


def bits_and_bytes(**kwargs):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(llm_int8_skip_modules=OTHERS, **kwargs)


def eight_bits():
    return bits_and_bytes(load_in_8bit=True)


def four_bits():
    return bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def torchao_linear():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=OTHERS)


def torchao_stacks():
    quantization = pytest.importorskip("torchao.quantization")
    eight = quantization.Int8WeightOnlyConfig()
    patterns = [r"re:.*experts.*(gate_up|down)_proj", r"re:.*language_model.*_proj\.weight"]
    return TorchAoConfig(quantization.FqnToConfig(dict.fromkeys(patterns, eight)))


# Whether the experts are unfused, the bits of an expert's weight with its scales at most, and the largest error.
QUANTISERS = {
    "bitsandbytes, 8 bits": (eight_bits, True, 9, 0.15),
    "bitsandbytes, 4 bits": (four_bits, True, 5, 0.6),
    "torchao, 8 bits": (torchao_linear, True, 9, 0.15),
    "torchao, 8 bits, stacks": (torchao_stacks, False, 9, 0.15),
}


def num_bytes(tensor: torch.Tensor) -> int:
    """Returns the size of a tensor, also of one of torchao, which consists of others."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def expert_weights(model) -> list[torch.Tensor]:
    return [weight for block in sparse_blocks(model).values() for weight in block.experts.parameters()]


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", QUANTISERS)
def test_experts_are_quantised(name, kind, tmp_path):
    (make_config, unfused, bits, error), (make, inputs) = QUANTISERS[name], MODELS[kind]
    model, inputs = make(), inputs()
    model.save_pretrained(tmp_path / "model")
    num_weights = sum(weight.numel() for weight in expert_weights(model))
    load = type(model).from_pretrained
    quantised = load(tmp_path / "model", quantization_config=make_config(), unfused_experts=unfused)
    sizes = [num_bytes(weight) for weight in expert_weights(quantised)]
    assert 3.9 / 8 * num_weights < sum(sizes) < bits / 8 * num_weights
    # First, because bitsandbytes 0.50 saves wrong scales of 4 bits after a forward pass on some CPUs.
    quantised.save_pretrained(tmp_path / "quantised")
    expected, outputs = logits_of(model, inputs), logits_of(quantised, inputs)
    assert 0 < (outputs - expected).norm() < error * expected.norm()
    again = load(tmp_path / "quantised")
    assert [num_bytes(weight) for weight in expert_weights(again)] == sizes
    torch.testing.assert_close(logits_of(again, inputs), outputs)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **arguments), quantised.generate(**inputs, **arguments))


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_on_experts_in_4_bits(kind, tmp_path):
    """Trained with Trainer on quantised experts, saved, loaded again, and merged into the original experts."""
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    model.save_pretrained(tmp_path / "model")
    load = type(model).from_pretrained

    def load_quantised():
        return load(tmp_path / "model", quantization_config=four_bits(), unfused_experts=True)

    base = prepare_model_for_kbit_training(load_quantised(), use_gradient_checkpointing=False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = expert_lora_config(base, r=4, lora_alpha=8)
    adapted = get_peft_model(base, config)
    batch = inputs | {"labels": inputs["input_ids"]}
    arguments = QUIET_TRAINING | {"max_steps": 3, "learning_rate": 0.02, "save_strategy": "no", "logging_steps": 1}
    trainer = Trainer(
        adapted,
        TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=2, **arguments),
        train_dataset=[{}] * 4,
        data_collator=lambda rows: batch,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, tensor in adapted.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    trainer.save_model(str(tmp_path / "adapter"))
    outputs = logits_of(adapted, inputs)
    with adapted.disable_adapter():
        assert (logits_of(adapted, inputs) - outputs).abs().max() > 0.1
    again = PeftModel.from_pretrained(load_quantised(), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again, inputs), outputs)

    # Merged into the original weights, and stacked again.
    unmerged = PeftModel.from_pretrained(load(tmp_path / "model", unfused_experts=True), tmp_path / "adapter")
    expected = logits_of(unmerged, inputs)
    unmerged.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load(tmp_path / "merged", unfused_experts=False)
    assert merged.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits_of(merged, inputs), expected, rtol=1e-4, atol=1e-4)
