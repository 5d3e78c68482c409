"""Upcycled models for sequence classification, such as reward models, in place of the language head."""

import copy
import inspect
import pickle

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GPT2Config,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from modeling_sparse_moe_vlm import modeling_upcycled, modeling_upcycled_classification
from modeling_sparse_moe_vlm.configuration_upcycled import upcycled_config_class
from modeling_sparse_moe_vlm.modeling_upcycled_classification import classification_model_class
from modeling_sparse_moe_vlm.toolbox.hub import write_model_card
from modeling_sparse_moe_vlm.toolbox.installed_code import use_installed_code
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.support.upcycled import make_dense, make_few_experts, make_inputs

PAD = 1  # not among the tokens of the inputs


def make_classifier(model, folder, **kwargs):
    """Saves a model with a language head, and loads it for sequence classification, with one score."""
    model.save_pretrained(folder)
    use_installed_code(folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **kwargs)
    loaded.config.get_text_config().pad_token_id = PAD
    return loaded


def padded_inputs(kind: str) -> dict[str, torch.Tensor]:
    """Returns two rows of 14 tokens, the last three of the second row being padding."""
    inputs = make_inputs(kind, padded=False)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 11:] = 0
    inputs["input_ids"][1, 11:] = PAD
    return inputs


def tensors_in(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", ["qwen3_vl", pytest.param("llama", marks=pytest.mark.extensive)])
def test_the_last_token_is_scored_with_the_experts_of_the_language_model(kind, tmp_path):
    source, inputs = make_few_experts(kind, seed=3), padded_inputs(kind)
    model = make_classifier(source, tmp_path / "source")
    assert type(model) is classification_model_class(type(source.config))
    assert type(model).__name__ == type(source).__name__.partition("For")[0] + "ForSequenceClassification"
    assert model.score.weight.shape == (1, source.config.get_text_config().hidden_size)
    with torch.no_grad():
        expected = source(**inputs, output_router_logits=True, output_hidden_states=True)
        last = source.base_model(**inputs).last_hidden_state[torch.arange(2), torch.tensor([13, 10])]
        outputs = model(**inputs, output_router_logits=True)
        torch.testing.assert_close(outputs.logits, last @ model.score.weight.T)
        for one, other in zip(outputs.router_logits, expected.router_logits, strict=True):
            torch.testing.assert_close(one, other)
        assert "router_logits" not in model(**inputs)
        as_tuple = model(**inputs, output_router_logits=True, return_dict=False)
        torch.testing.assert_close(as_tuple[0], outputs.logits)

        model.save_pretrained(tmp_path / "classifier")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
        for other in (again, copy.deepcopy(model)):
            torch.testing.assert_close(other(**inputs).logits, outputs.logits)
    assert type(again) is type(model)
    assert again.config.num_labels == 1
    assert again.config.auto_map["AutoModelForSequenceClassification"] == (
        f"modeling_upcycled_classification.{type(model).__name__}"
    )
    assert pickle.loads(pickle.dumps(again.config)).auto_map == again.config.auto_map
    of_source, of_classifier = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "classifier")
    of_source = {name: tensor for name, tensor in of_source.items() if not name.endswith("lm_head.weight")}
    assert of_classifier.keys() == of_source.keys() | {"score.weight"}
    assert all(torch.equal(of_classifier[name], tensor) for name, tensor in of_source.items())
    auto_class = AutoModelForCausalLM if kind == "llama" else AutoModelForImageTextToText
    _, report = auto_class.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    assert set(report["unexpected_keys"]) == {"score.weight"}


def test_scores_and_loss_are_those_of_the_dense_model(tmp_path):
    dense = make_dense("llama")
    config = LlamaConfig(**dense.config.to_dict() | {"pad_token_id": PAD, "num_labels": 3})
    reference = LlamaForSequenceClassification(config).eval()
    reference.model.load_state_dict(dense.model.state_dict())
    upcycle(dense).save_pretrained(tmp_path)
    use_installed_code(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=PAD)
    model.score.load_state_dict(reference.score.state_dict())
    inputs, labels = padded_inputs("llama"), torch.tensor([2, 0])
    with torch.no_grad():
        expected = reference(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, labels=labels)
        outputs = model(**inputs, labels=labels)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert outputs.logits.shape == (2, 3)


def test_images_and_their_experts_matter(tmp_path):
    model, inputs = make_classifier(make_few_experts(), tmp_path), padded_inputs("llava")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert (model(**inputs | {"pixel_values": inputs["pixel_values"].flip(0)}).logits - logits).abs().min() > 1e-3
        ids = torch.zeros_like(inputs["input_ids"])
        assert (model(**inputs, mm_token_type_ids=ids).logits - logits).abs().min() > 1e-3


def test_all_weights_get_gradients(tmp_path):
    model = make_classifier(make_few_experts("qwen3_vl"), tmp_path, router_aux_loss_coef=0.0).train()
    model(**padded_inputs("qwen3_vl"), labels=torch.tensor([0.5, 1.0])).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_signature_has_the_arguments_of_the_base_model():
    """`Trainer` removes the columns that are not in it."""
    for name, images in (("Llava", ["pixel_values"]), ("Qwen3VL", ["pixel_values", "image_grid_thw"]), ("Llama", [])):
        made = getattr(modeling_upcycled_classification, f"Upcycled{name}ForSequenceClassification")
        parameters = inspect.signature(made.forward).parameters
        for argument in ["input_ids", "labels", "mm_token_type_ids", "output_router_logits", *images]:
            assert argument in parameters
        assert [*parameters][-1] == "kwargs"
    made = classification_model_class(LlamaConfig)
    assert made is classification_model_class(upcycled_config_class(LlamaConfig))
    assert made.config_class is upcycled_config_class(LlamaConfig)
    for name in ("UpcycledNothingForSequenceClassification", "LlamaForSequenceClassification", "nothing"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(modeling_upcycled_classification, name)


def test_router_losses_without_effect_cause_one_warning(monkeypatch, tmp_path):
    warnings: list[str] = []
    monkeypatch.setattr(modeling_upcycled_classification.logger, "warning", warnings.append)
    inputs = padded_inputs("llama")
    model = make_classifier(make_few_experts("llama"), tmp_path, router_aux_loss_coef=0.5, router_z_loss_coef=0.0)
    model(**inputs)
    with torch.no_grad():
        model.train()(**inputs)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        model(**inputs)
    assert warnings == []
    for _ in range(2):
        loss = model(**inputs, labels=torch.tensor([0.5, 1.0]), output_router_logits=True).loss
    torch.testing.assert_close(loss, model.eval()(**inputs, labels=torch.tensor([0.5, 1.0])).loss)
    (warning,) = warnings
    assert warning.startswith("`router_aux_loss_coef` has no effect: models for sequence classification do not add")
    model = make_classifier(make_few_experts("llama"), tmp_path, router_aux_loss_coef=0.0)
    model.train()(**inputs)
    assert len(warnings) == 1


def test_router_biases_that_are_not_updated_cause_one_warning(monkeypatch):
    models = []
    monkeypatch.setattr(modeling_upcycled, "warn_of_resting_biases", models.append)
    config = make_few_experts("llama", router_bias_update_rate=0.1).config
    config.pad_token_id = PAD
    model = classification_model_class(LlamaConfig)(config).train()
    for _ in range(2):
        model(**padded_inputs("llama"))
    assert models == [model]


def test_a_base_model_whose_parts_have_no_prefix():
    made = classification_model_class(Kosmos2Config)
    assert Kosmos2ForConditionalGeneration.base_model_prefix == ""
    assert made.base_model_prefix == "model"
    assert classification_model_class(GPT2Config).base_model_prefix == "transformer"


@pytest.mark.newest
def test_card_of_a_reward_model(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make_classifier(make_few_experts("llama"), tmp_path / "source").save_pretrained(tmp_path / "reward")
    write_model_card(tmp_path / "reward", base_model="some/llama", model_name="my-reward")
    lines = (tmp_path / "reward" / "README.md").read_text().splitlines()
    assert "pipeline_tag: text-classification" in lines
    assert 'model = AutoModelForSequenceClassification.from_pretrained("my-reward", trust_remote_code=True)' in lines
    assert any(
        line.endswith("A layer for sequence classification (`num_labels=1`) replaces the language head.")
        for line in lines
    )
    assert not any("generate" in line for line in lines)
