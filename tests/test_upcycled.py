"""Upcycled models: classes derived from those of a base, modalities of tokens, router losses and checkpoints."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, Qwen3VLConfig
from transformers.generation import GenerationMixin
from transformers.models.auto import modeling_auto
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from modeling_sparse_moe_vlm import configuration_upcycled, losses, modeling_upcycled
from modeling_sparse_moe_vlm.configuration_upcycled import UpcycledExpertsConfig, upcycled_config_class
from modeling_sparse_moe_vlm.experts_config import experts_config_of
from modeling_sparse_moe_vlm.losses import router_losses
from modeling_sparse_moe_vlm.modeling_upcycled import upcycled_model_class
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from modeling_sparse_moe_vlm.upcycled_layers import UpcycledBlock, current_plan, upcycled_layer_class
from tests.support.in_tree_models import GREEDY, IMAGE, VIDEO
from tests.support.upcycled import make_dense, make_dense_inputs, make_few_experts

NAMES = ["llama", "llava", "qwen3_vl"]
EXPERTS = {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4}


def chosen_by(model, **inputs) -> torch.Tensor:
    """Returns the experts of each token in the first sparse layer, `(B, T, k)`."""
    with torch.no_grad():
        indices = model(**inputs, output_router_logits=True).router_indices[0]
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    return indices.view(*tokens.shape[:2], -1)


def is_served_as_image(model, **inputs) -> torch.Tensor:
    """Returns which tokens use image experts in a model with two text and two image experts, `(B, T)`."""
    of_images = chosen_by(model, **inputs) >= 2
    assert (of_images.all(-1) == of_images.any(-1)).all()
    return of_images.all(-1)


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("base", [LlamaConfig, LlavaConfig, Qwen3VLConfig])
def test_configurations_are_those_of_the_base_with_an_experts_configuration(base, tmp_path):
    config_class = upcycled_config_class(base)
    assert upcycled_config_class(base) is config_class
    assert issubclass(config_class, base)
    config = config_class(experts_config=EXPERTS)
    assert config.model_type == f"upcycled_{base.model_type}"
    assert isinstance(config.experts_config, UpcycledExpertsConfig)
    assert config.auto_map["AutoConfig"] == f"configuration_upcycled.Upcycled{base.__name__}"
    assert config.auto_map["AutoModel"] == f"modeling_upcycled.Upcycled{base.__name__.removesuffix('Config')}Model"
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["experts_config"]["num_experts"] == 4
    for again in (config_class.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert type(again) is config_class
        assert again.to_dict() == config.to_dict()
        assert experts_config_of(again.get_text_config()) is again.experts_config


@pytest.mark.parametrize(
    ("base", "model", "has_images"),
    [
        (LlamaConfig, "UpcycledLlamaForCausalLM", False),
        (LlavaConfig, "UpcycledLlavaForConditionalGeneration", True),
    ],
)
def test_transformers_serve_finds_the_model(base, model, has_images):
    """It looks up the model type in these tables and then uses `AutoModelForMultimodalLM`, also for text."""
    config = upcycled_config_class(base)(experts_config=EXPERTS)
    assert config.auto_map["AutoModelForMultimodalLM"] == f"modeling_upcycled.{model}"
    assert modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type] == model
    of_images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    assert of_images == (model if has_images else None)
    assert ("AutoModelForImageTextToText" in config.auto_map) == has_images


@pytest.mark.parametrize("base", [LlamaConfig, LlavaConfig])
def test_trainers_find_the_settings_of_routers_in_the_decoders_configuration(base):
    """TRL reads and writes them there. They belong to the experts configuration and are saved only once."""
    config = upcycled_config_class(base)(experts_config=EXPERTS)
    text_config = config.get_text_config()
    text_config.output_router_logits, text_config.router_aux_loss_coef = True, 0.5
    assert (config.experts_config.output_router_logits, config.experts_config.router_aux_loss_coef) == (True, 0.5)
    config.experts_config.router_aux_loss_coef = 0.25
    assert text_config.router_aux_loss_coef == 0.25
    saved = config.to_dict()
    assert "router_aux_loss_coef" not in saved | saved.get("text_config", {})
    assert "_experts_config" not in saved | saved.get("text_config", {})
    assert not hasattr(base(), "router_aux_loss_coef")


def test_fields_of_the_experts_are_arguments_of_loading(tmp_path):
    make_few_experts().save_pretrained(tmp_path)
    model_class = upcycled_model_class(LlavaForConditionalGeneration)
    model = model_class.from_pretrained(tmp_path, num_experts_per_tok=1, norm_topk_prob=False)
    assert model.experts_config.num_experts_per_tok == 1
    assert chosen_by(model, **make_dense_inputs()).shape[-1] == 1
    with pytest.raises(TypeError, match="did you mean `num_experts_per_tok`"):
        model_class.from_pretrained(tmp_path, num_expert_per_tok=1)


def test_sparse_layers_need_their_blocks():
    with pytest.raises(ValueError, match=r"`blocks` names 1 blocks, but the sparse layers are \[0, 1\]"):
        UpcycledExpertsConfig(**EXPERTS, blocks=["layers.0.mlp"])
    with pytest.raises(ValueError, match="`blocks` repeats a value"):
        UpcycledExpertsConfig(**EXPERTS, blocks=["layers.0.mlp"] * 2)
    config = upcycled_config_class(LlamaConfig)(experts_config=EXPERTS)
    with pytest.raises(ValueError, match=r"must say which blocks are sparse: .* `upcycle\(model\)`"):
        upcycled_model_class(LlamaForCausalLM)(config)


def test_placeholders_of_modalities_without_experts_of_their_own():
    ids = {"image": [3], "video": [4], "audio": [5]}
    config = UpcycledExpertsConfig(**EXPERTS, placeholder_ids=ids)
    assert config.placeholders == {1: [3, 4]}  # audio counts as text
    config = UpcycledExpertsConfig(**EXPERTS, placeholder_ids=ids, modalities=["text", "image", "video", "audio"])
    assert config.placeholders == {1: [3], 2: [4], 3: [5]}
    assert UpcycledExpertsConfig(**EXPERTS, placeholder_ids=ids, modalities=["text"]).placeholders == {}


# ------------------------------------------------------------------------------------------------ classes


def test_classes_are_derived_from_those_of_the_base():
    model = make_few_experts()
    made = upcycled_model_class(LlavaForConditionalGeneration)
    assert type(model) is made is modeling_upcycled.UpcycledLlavaForConditionalGeneration
    assert issubclass(made, LlavaForConditionalGeneration)
    assert made.config_class is configuration_upcycled.UpcycledLlavaConfig
    assert [type(part).__name__ for part in (model.model, model.model.language_model)] == [
        "UpcycledLlavaModel",
        "UpcycledLlamaModel",
    ]
    layer = model.model.language_model.layers[0]
    assert isinstance(layer, LlamaDecoderLayer)
    assert type(layer).__name__ in model._no_split_modules
    assert type(layer) is upcycled_layer_class(LlamaDecoderLayer) is upcycled_layer_class(type(layer))
    assert isinstance(layer.mlp, UpcycledBlock)
    with pytest.raises(AttributeError, match="no attribute 'UpcycledNothing'"):
        _ = modeling_upcycled.UpcycledNothing
    with pytest.raises(AttributeError, match="no attribute 'UpcycledLlamaModel'"):
        _ = configuration_upcycled.UpcycledLlamaModel


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    model, inputs = make_few_experts(name, "hybrid"), make_dense_inputs(name)
    others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in others:
            assert type(other) is type(model)
            torch.testing.assert_close(other(**inputs).logits, expected, rtol=0, atol=0)
    assert others[1].experts_config is others[1].config.experts_config is not model.experts_config
    others[1].experts_config.output_router_logits = True
    assert "router_logits" in others[1](**inputs)
    assert "router_logits" not in model(**inputs)


def test_models_from_a_configuration_are_initialised():
    model = make_few_experts(expert_groups="hybrid", router_bias_update_rate=0.0)
    torch.manual_seed(0)
    made = type(model)(copy.deepcopy(model.config))
    block = made.model.language_model.layers[1].mlp
    for weight in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert weight.std().item() == pytest.approx(0.2, rel=0.15)
    assert block.shared_experts["image"].down_proj.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert not block.gate.e_score_correction_bias.any()
    assert made.experts_config._experts_implementation == model.experts_config._experts_implementation


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3", "gemma3"])
def test_image_tokens_use_image_experts(name):
    model, inputs = make_few_experts(name), make_dense_inputs(name)
    is_image = inputs["input_ids"] == IMAGE
    assert is_image.sum() == 8
    assert torch.equal(is_served_as_image(model, **inputs), is_image)
    text = {"input_ids": torch.full((1, 5), 9)}
    assert not is_served_as_image(model, **text).any()


def test_given_ids_are_used_and_embedded_placeholders_are_found():
    model, inputs = make_few_experts(), make_dense_inputs()
    is_image = inputs["input_ids"] == IMAGE
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    assert torch.equal(is_served_as_image(model, inputs_embeds=embeds), is_image)
    ids = torch.zeros_like(is_image).long()
    ids[:, :3] = 1
    assert torch.equal(is_served_as_image(model, inputs_embeds=embeds + 1, mm_token_type_ids=ids), ids.bool())
    # Transformers uses the id 2 for videos, which use image experts. Audio uses text experts.
    assert torch.equal(is_served_as_image(model, inputs_embeds=embeds + 1, mm_token_type_ids=2 * ids), ids.bool())
    assert not is_served_as_image(model, inputs_embeds=embeds + 1, mm_token_type_ids=3 * ids).any()
    with pytest.raises(ValueError, match=r"has shape \(2, 3\), but there are tokens of shape \(2, 14\)"):
        model(**inputs, mm_token_type_ids=ids[:, :3])


def test_videos_use_image_experts_or_their_own():
    inputs = {"input_ids": torch.tensor([[9, VIDEO, VIDEO, 8]])}
    model = make_few_experts("qwen3_vl")
    with torch.no_grad():
        ids = inputs["input_ids"]
        assert model.experts_config.placeholders == {1: [IMAGE, VIDEO]}
        plan_ids = model._tokens({"input_ids": ids}, model.routing_planner, None).ids
        assert plan_ids.tolist() == [[0, 1, 1, 0]]
    own = make_few_experts("qwen3_vl", num_experts=6, modalities=["text", "image", "video"])
    assert own._tokens({"input_ids": ids}, own.routing_planner, None).ids.tolist() == [[0, 2, 2, 0]]


def test_embeddings_of_unknown_modality_cause_a_warning(caplog, monkeypatch):
    messages = []
    monkeypatch.setattr(modeling_upcycled.logger, "warning_once", messages.append)
    embeds = torch.randn(1, 4, 32)
    make_few_experts(expert_groups="joint")(inputs_embeds=embeds)
    model = make_few_experts()
    model(input_ids=torch.tensor([[9, 8]]))
    model(inputs_embeds=embeds, mm_token_type_ids=torch.zeros(1, 4, dtype=torch.long))
    assert messages == []
    model(inputs_embeds=embeds)
    assert len(messages) == 1
    assert "`inputs_embeds` came without `mm_token_type_ids`" in messages[0]


def test_generated_placeholders_are_text():
    model, inputs = make_few_experts(), make_dense_inputs()
    cache = model(**inputs, use_cache=True).past_key_values
    cache_name = "cache" if "cache" in model(**inputs) else "past_key_values"
    said = {"input_ids": torch.full((2, 2), IMAGE), cache_name: cache}
    assert not is_served_as_image(model, **said).any()


def test_padding_is_not_part_of_the_losses():
    model = make_few_experts(expert_groups="joint")
    inputs = make_dense_inputs()
    inputs["attention_mask"][1, :2] = 0
    outputs = model(**inputs, output_router_logits=True)
    assert outputs.router_logits[0].shape == (28, 4)
    expected = router_losses(
        model.experts_config,
        outputs.router_logits,
        (inputs["input_ids"] == IMAGE).long(),
        inputs["attention_mask"],
        router_indices=outputs.router_indices,
    )
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
    unpadded = router_losses(model.experts_config, outputs.router_logits, (inputs["input_ids"] == IMAGE).long())
    assert not torch.isclose(outputs.aux_loss, unpadded.aux_loss)


@torch.no_grad()
def test_threads_do_not_mix_up_their_tokens():
    model, inputs = make_few_experts(), make_dense_inputs()
    text = {"input_ids": torch.randint(7, 99, (3, 9))}
    expected = [model(**inputs).logits, model(**text).logits]

    def runs_as_expected(number: int) -> bool:
        return torch.equal(model(**(text if number % 2 else inputs)).logits, expected[number % 2])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(runs_as_expected, range(60)))
    assert current_plan() is None


def test_layers_called_without_their_model_are_an_error():
    model = make_few_experts()
    with pytest.raises(RuntimeError, match="The sparse block of layer 1 does not know the modalities of its tokens"):
        model.model.language_model.layers[1].mlp(torch.zeros(1, 2, 32))


def test_a_failed_pass_leaves_no_plan():
    model, inputs = make_few_experts(), make_dense_inputs()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
    assert current_plan() is None


def test_tokens_that_the_base_adds_are_an_error(monkeypatch):
    model = make_few_experts()
    layers = model.model.language_model.layers
    layers[0].register_forward_pre_hook(lambda _, args: (torch.cat([args[0], args[0]], dim=0),))
    with pytest.raises(ValueError, match="The decoder runs 8 tokens, but the call had 4"):
        model(input_ids=torch.tensor([[9, 8, 7, 9]]), attention_mask=None, use_cache=False)


@torch.no_grad()
def test_every_part_of_the_model_can_be_called():
    """Trainers call the model without its head, and serving engines call the decoder."""
    model, inputs = make_few_experts(), make_dense_inputs()
    expected = model(**inputs, output_router_logits=True)
    base = model.model(**inputs, output_router_logits=True)
    torch.testing.assert_close(model.lm_head(base.last_hidden_state), expected.logits)
    for found, wanted in zip(base.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert base.get("router_loss") is None
    text = torch.tensor([[9, 8, 7]])
    decoder = model.model.language_model(input_ids=text).last_hidden_state
    torch.testing.assert_close(model.lm_head(decoder), model(input_ids=text).logits)


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("name", NAMES)
def test_router_losses_are_added_to_the_loss(name):
    model, inputs = make_few_experts(name, "joint", router_z_loss_coef=0.1), make_dense_inputs(name)
    labels = inputs["input_ids"]
    plain = model(**inputs, labels=labels)
    assert plain.get("router_loss") is None
    outputs = model(**inputs, labels=labels, output_router_logits=True)
    ids = (labels == IMAGE).long() if name != "llama" else None
    expected = router_losses(model.experts_config, outputs.router_logits, ids, inputs["attention_mask"])
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
    torch.testing.assert_close(outputs.z_loss, expected.z_loss)
    torch.testing.assert_close(outputs.router_loss, 0.001 * expected.aux_loss + 0.1 * expected.z_loss)
    torch.testing.assert_close(outputs.loss, plain.loss + outputs.router_loss)
    # The first of two micro-batches, as with gradient accumulation in `Trainer`.
    num_items = 2 * (labels.numel() - len(labels))
    half = model(**inputs, labels=labels, output_router_logits=True, num_items_in_batch=num_items)
    torch.testing.assert_close(half.loss, outputs.loss / 2)


def test_losses_are_computed_if_the_configuration_says_so(monkeypatch):
    messages = []
    monkeypatch.setattr(losses.logger, "warning_once", messages.append)
    model, inputs = make_few_experts(expert_groups="joint", output_router_logits=True), make_dense_inputs()
    assert "router_loss" not in model(**inputs)
    assert "router_logits" in model(**inputs)
    assert "router_logits" not in model(**inputs, output_router_logits=False)
    assert model(**inputs, labels=inputs["input_ids"]).router_loss is not None
    assert not messages
    model.train()(**inputs)
    assert "got no `labels`" in messages[0]


def test_biases_that_are_not_updated_cause_one_warning(monkeypatch):
    models = []
    monkeypatch.setattr(modeling_upcycled, "warn_of_resting_biases", models.append)
    inputs = make_dense_inputs()
    for rate, expected in ((None, 0), (0.0, 0), (0.1, 1)):
        model = make_few_experts(expert_groups="joint", router_bias_update_rate=rate)
        model(**inputs)
        model.train()
        with torch.no_grad():
            model(**inputs)
        model(**inputs, output_router_logits=True)
        assert models == []
        for _ in range(2):
            model(**inputs)
        assert models == [model] * expected
        models.clear()


def test_outputs_as_tuples():
    model, inputs = make_few_experts(expert_groups="joint"), make_dense_inputs()
    outputs = model(**inputs, output_router_logits=True, labels=inputs["input_ids"])
    as_tuple = model(**inputs, output_router_logits=True, labels=inputs["input_ids"], return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(outputs.to_tuple())
    torch.testing.assert_close(as_tuple[0], outputs.loss)
    assert type(outputs).__name__ == "UpcycledLlavaCausalLMOutputWithPast"
    assert isinstance(model(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_checkpointing_gives_the_same_gradients_with_another_pass_in_between(name):
    model, inputs = make_few_experts(name, "hybrid").train(), make_dense_inputs(name)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False).loss
        model(input_ids=torch.full((1, 3), 9), use_cache=False)
        loss.backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    expected = gradients()
    new = {key for key, _ in model.named_parameters() if "expert" in key or ".mlp.gate." in key}
    assert len(new) == 2 * (3 + 3 * len(model.experts_config.modalities))
    assert new <= expected.keys()
    model.gradient_checkpointing_enable()
    found = gradients()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-7, msg=key)


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("name", NAMES)
def test_generation_in_every_mode(name):
    model = make_few_experts(name)
    inputs = make_dense_inputs(name)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), expected)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)
    assert model.generate(**inputs, num_beams=2, max_new_tokens=3).shape == (2, 17)
    one = {key: value[:1] for key, value in inputs.items()}
    if name == "qwen3_vl":
        one["pixel_values"] = inputs["pixel_values"][:16]
    expected = model.generate(**one, **GREEDY)
    assert torch.equal(model.generate(**one, **GREEDY, assistant_model=model), expected)
    assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=2), expected)


@torch.no_grad()
@pytest.mark.parametrize("expert_groups", ["joint", "isolated", "hybrid"])
def test_compiled_in_one_graph(expert_groups):
    """Dynamo traces the `threading.local` that passes the plan to the layers."""
    model, inputs = make_few_experts(expert_groups=expert_groups), make_dense_inputs()
    expected = model(**inputs).logits  # the first pass sets hooks of Transformers, which cannot be traced
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)


# ------------------------------------------------------------------------------------------------ checkpoints


def tensors_in(folder) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("expert_groups", ["joint", "isolated", "hybrid"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_keep_the_names_of_the_base_and_contain_experts_one_by_one(name, expert_groups, tmp_path):
    model, inputs = make_few_experts(name, expert_groups), make_dense_inputs(name)
    model.save_pretrained(tmp_path / "sparse", max_shard_size="30KB")
    make_dense(name).save_pretrained(tmp_path / "dense")
    saved = tensors_in(tmp_path / "sparse")
    dense = set(load_file(tmp_path / "dense" / "model.safetensors"))
    blocks = {key for key in dense if ".mlp." in key and "vision" not in key and "visual" not in key}
    assert dense - blocks == {key for key in saved if ".experts." not in key and "_experts." not in key} - {
        key for key in saved if key.endswith(".mlp.gate.weight")
    }
    assert len([key for key in saved if key.endswith(".gate_proj.weight") and ".experts." in key]) == 2 * 4
    expected = model(**inputs).logits
    again = type(model).from_pretrained(tmp_path / "sparse", num_expert_shards=2)
    torch.testing.assert_close(again(**inputs).logits, expected)
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(tensors_in(tmp_path / "again"), saved, rtol=0, atol=0)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_saving_looks_up_the_conversions_once(is_loaded, tmp_path, monkeypatch):
    model = make_few_experts("llava", "joint")
    if is_loaded:
        model.save_pretrained(tmp_path / "before")
        model = type(model).from_pretrained(tmp_path / "before")
    calls = []
    look_up = type(model).library_conversions
    monkeypatch.setattr(type(model), "library_conversions", lambda self: calls.append(self) or look_up(self))
    before = dict(model.__dict__)
    model.save_pretrained(tmp_path / "saved")
    assert len(calls) == (not is_loaded)
    assert model.__dict__ == before


def test_parts_load_from_the_whole_model_and_back(tmp_path):
    model, inputs = make_few_experts(), make_dense_inputs()
    model.save_pretrained(tmp_path)
    base = type(model.model).from_pretrained(tmp_path)
    torch.testing.assert_close(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["UpcycledLlavaModel"]
    again = type(base).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(again(**inputs).last_hidden_state, base(**inputs).last_hidden_state)


def test_implementations_of_experts(tmp_path):
    model, inputs = make_few_experts(), make_dense_inputs()
    model.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        loaded = type(model).from_pretrained(tmp_path, experts_implementation=implementation)
        assert loaded.experts_config._experts_implementation == implementation
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        model.set_experts_implementation(implementation)
        assert model.experts_config._experts_implementation == implementation
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()


def test_parallel_plans_name_the_experts():
    model = make_few_experts(expert_groups="hybrid", expert_pool=None)
    place = "model.language_model.layers.*.mlp"
    assert model._ep_plan == {
        f"{place}.experts.gate_up_proj": "grouped_gemm",
        f"{place}.experts.down_proj": "grouped_gemm",
        f"{place}.experts": "ep_dispatch_experts",
    }
    for projection, style in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise")):
        for group in ("text", "image"):
            assert model._tp_plan[f"{place}.shared_experts.{group}.{projection}"] == style
    assert model._tp_plan[f"{place}.experts.gate_up_proj"] == "packed_colwise"
    isolated = make_few_experts()
    assert isolated._ep_plan[f"{place}.experts.image"] == "ep_dispatch_experts"
    assert f"{place}.experts" not in isolated._ep_plan
    pooled = make_few_experts(expert_groups="hybrid", expert_pool=[0, 0])
    assert pooled._ep_plan["model.language_model.expert_pools.*"] == "ep_dispatch_experts"


def test_layers_share_a_pool(tmp_path):
    model, inputs = make_few_experts(expert_groups="hybrid", expert_pool=[0, 0]), make_dense_inputs()
    pools = model.model.language_model.expert_pools
    assert list(pools) == ["0"]
    assert model.model.language_model.layers[0].mlp.experts is None
    expected = model(**inputs).logits
    with torch.no_grad():
        pools["0"].down_proj.zero_()
    assert not torch.allclose(model(**inputs).logits, expected)
    model = make_few_experts(expert_groups="hybrid", expert_pool=[0, 0])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(**inputs).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_attentions_are_recorded(name, tmp_path):
    """When a model is created, Transformers stores by class which outputs can be recorded."""
    dense, inputs = make_dense(name), make_dense_inputs(name)
    sparse = upcycle(dense, "hybrid")
    sparse.save_pretrained(tmp_path)
    for model in (dense, sparse):
        model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected = dense(**inputs, **wanted)
    assert len(expected.hidden_states) == 3
    for model in (sparse, type(sparse).from_pretrained(tmp_path, attn_implementation="eager")):
        outputs = model(**inputs, **wanted, output_router_logits=True)
        torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)
        torch.testing.assert_close(outputs.attentions, expected.attentions)
        assert len(outputs.router_logits) == 2
        base = model.base_model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(base.hidden_states, expected.hidden_states)


def test_generation_is_a_direct_base():
    """Otherwise, the auto classes create a subclass of a model with remote code, and it cannot be pickled."""
    for name in NAMES:
        assert GenerationMixin in type(make_few_experts(name, "joint")).__bases__
