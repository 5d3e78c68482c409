"""DeepStack features of the vision tower, which are added to the hidden states of the first decoder layers."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.deepstack import Deepstack
from tests.support.models import TEXT_CONFIG
from tests.support.rows_and_batches import check_rows_of_batch
from tests.test_native_towers import MERGING, OF_LATER, image_of, make_config, make_model, make_processor

# Three layers, with the levels after the third and the first. The tower returns the levels in the order of its layers.
TOWER = OF_LATER | {
    "model_type": "qwen3_vl_vision",
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [2, 0],
    "depth": 3,
}


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3", vision_config=TOWER, use_deepstack=True)


def make_video_model(**fields):
    fields = {"video_token_id": 1, "modalities": ["text", "image", "video"], "video_temporal_pooling": 2} | fields
    return make_model("qwen3", vision_config=TOWER, use_deepstack=True, **fields)


def levels_of(model, image, processor) -> list[torch.Tensor]:
    """The projected DeepStack features of one image, computed step by step."""
    inputs = processor(images=image, return_tensors="pt")
    rows, columns = inputs["image_grid_thw"][0, 1:].tolist()
    # The tower gets squares of 2 × 2 patches, and every patch as two equal frames.
    patches = inputs["pixel_values"].view(rows // 2, 2, columns // 2, 2, 3, 1, 16).transpose(1, 2)
    frames = patches.expand(-1, -1, -1, -1, -1, 2, -1).reshape(rows * columns, 96)
    outputs = model.model.vision_tower(frames, grid_thw=inputs["image_grid_thw"])
    projectors = model.model.multi_modal_projector.deepstack_projectors
    return [
        projector.linear_2(projector.act(projector.linear_1(features)))
        for projector, features in zip(projectors, outputs.deepstack_features, strict=True)
    ]


def logits_with_hooks(model, inputs, levels: list[torch.Tensor]) -> torch.Tensor:
    """The logits of a copy of the model without DeepStack, with levels added after the layers as in Qwen3-VL."""
    plain = copy.deepcopy(model)
    plain.config.use_deepstack = False
    is_visual = inputs["mm_token_type_ids"] > 0
    for layer, level in zip(plain.model.language_model.layers, levels, strict=False):
        layer.register_forward_hook(
            lambda _, __, hidden, level=level: Qwen3VLTextModel._deepstack_process(None, hidden, is_visual, level)
        )
    return plain(**inputs).logits


@torch.no_grad()
def test_levels_are_added_after_the_first_layers(model):
    processor = make_processor(model.config)
    images = [image_of(24, 48), image_of(20, 20)]
    inputs = processor(text="a<image>b<image>c", images=images, return_tensors="pt")
    levels = [torch.cat(own) for own in zip(*(levels_of(model, each, processor) for each in images), strict=True)]
    assert [level.shape for level in levels] == [(18 + 9, 32)] * 2
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, logits_with_hooks(model, inputs, levels), rtol=1e-5, atol=1e-5)
    # Both levels matter, and so does their order.
    for others in ([], levels[:1], levels[::-1]):
        assert not torch.allclose(logits, logits_with_hooks(model, inputs, others), atol=1e-2)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert [[len(image) for image in level] for level in features.deepstack_features] == [[18, 9]] * 2
    for level, own in zip(levels, features.deepstack_features, strict=True):
        torch.testing.assert_close(level, torch.cat(own), rtol=1e-5, atol=1e-5)


def test_a_level_is_added_to_its_own_layer_only():
    is_placeholder = torch.tensor([[False, True, True], [True, False, False]])
    levels = [torch.arange(6.0).view(3, 2) + 1, torch.arange(6.0).view(3, 2) - 9]
    hidden_states = torch.full((2, 3, 2), 100.0)
    deepstack = Deepstack(is_placeholder, levels)
    expected = [[[100, 100], [101, 102], [103, 104]], [[105, 106], [100, 100], [100, 100]]]
    assert deepstack.add_level(0, hidden_states).tolist() == expected
    expected = [[[100, 100], [91, 92], [93, 94]], [[95, 96], [100, 100], [100, 100]]]
    assert deepstack.add_level(1, hidden_states).tolist() == expected
    assert deepstack.add_level(2, hidden_states) is hidden_states


def test_batches_and_generation(model):
    processor = make_processor(model.config)
    images = [[image_of(45, 70), image_of(20, 20)], [], [image_of(60, 30)]]
    batch = check_rows_of_batch(model, processor, images)
    generate = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, **generate), model.generate(**batch, **generate, use_cache=False))


@torch.no_grad()
def test_several_sequences_in_a_row(model):
    processor = make_processor(model.config)
    images = [image_of(24, 48), image_of(20, 20)]
    rows = [
        processor(text=text, images=image, return_tensors="pt")
        for text, image in zip(["<image>a", "bc<image>"], images, strict=True)
    ]
    packed = {name: torch.cat([row[name] for row in rows], dim=1) for name in ("input_ids", "mm_token_type_ids")}
    packed |= {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_thw")}
    positions = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    logits = model(**packed, position_ids=positions).logits
    expected = torch.cat([model(**row).logits for row in rows], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_that_were_computed_before(model):
    inputs = make_processor(model.config)(text="<image>a", images=image_of(24, 48), return_tensors="pt")
    expected = model(**inputs).logits
    features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_grid_thw"))
    assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)
    features.deepstack_features = None
    with pytest.raises(ValueError, match=r"`mm_encoder_outputs\['image'\]` has no `deepstack_features`"):
        model(**inputs, mm_encoder_outputs={"image": features})


@torch.no_grad()
def test_images_and_videos():
    model = make_video_model()
    processor = make_processor(model.config, video_token="<|im_start|>", video_temporal_pooling=2)
    video = np.random.default_rng(0).integers(0, 256, (4, 20, 50, 3), dtype=np.uint8)
    inputs = processor(text="<|im_start|>?<image>!", videos=video, images=image_of(24, 48), return_tensors="pt")
    frames = model.get_image_features(inputs["pixel_values_videos"]).deepstack_features
    features = model.get_video_features(inputs["pixel_values_videos"])
    of_video = [torch.stack(level).unflatten(0, (2, 2)).mean(dim=1).flatten(0, 1) for level in frames]
    assert [[len(tokens) for tokens in level] for level in features.deepstack_features] == [[4, 4]] * 2
    of_image = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).deepstack_features
    levels = [torch.cat([of_video[number], *of_image[number]]) for number in range(2)]  # the video comes first
    expected = logits_with_hooks(model, inputs, levels)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_has_a_gradient():
    model = make_model("qwen3", vision_config=TOWER, use_deepstack=True).train()
    batch = make_processor(model.config)(text="<image>a", images=image_of(20, 50), return_tensors="pt")
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: own.grad for name, own in model.named_parameters() if own.requires_grad})
        model.gradient_checkpointing_enable()
    assert all(gradient is not None for gradient in gradients[0].values())
    for name in ("deepstack_projectors.1.linear_1.weight", "deepstack_projectors.0.linear_2.bias"):
        name = f"model.multi_modal_projector.{name}"
        assert gradients[0][name].abs().max() > 0
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6)


def test_rows_without_images_reach_every_parameter_in_several_processes():
    """A process without images runs the tower on a blank image, because the others wait for the gradients."""
    model = make_model("qwen3", vision_config=TOWER, use_deepstack=True).train()
    features = model.model._blank_image_features()
    assert features.shape == (3, 32)  # one token in the embeddings and in both levels
    features.sum().backward()
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    assert all(own.grad is not None for part in parts for own in part.parameters())


@torch.no_grad()
def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    inputs = make_processor(model.config)(text="<image>", images=image_of(20, 50), return_tensors="pt")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.config.use_deepstack is True
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_models_without_the_features():
    """Checkpoints from before the option have no projectors and compute what they did."""
    model = make_model("qwen3", vision_config=TOWER)
    assert model.config.use_deepstack is None
    assert not [name for name in model.state_dict() if "deepstack_projectors" in name]
    inputs = make_processor(model.config)(text="<image>a", images=image_of(24, 48), return_tensors="pt")
    assert model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).get("deepstack_features") is None
    assert torch.equal(model(**inputs).logits, logits_with_hooks(model, inputs, []))


@pytest.mark.parametrize(("use_deepstack", "warns"), [(None, True), (False, False), (True, False)])
def test_ignored_features_are_a_warning(use_deepstack, warns, monkeypatch):
    messages = []
    module = "modeling_sparse_moe_vlm.modeling_sparse_moe_vlm.logger.warning_once"
    monkeypatch.setattr(module, lambda message, *_: messages.append(message))
    make_model("qwen3", vision_config=TOWER, use_deepstack=use_deepstack)
    make_model("naflex")
    assert len(messages) == warns
    assert all(r"(qwen3_vl_vision) also returns DeepStack features" in message for message in messages)


@torch.no_grad()
def test_embeddings_without_images_are_a_warning(model, monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_sparse_moe_vlm.input_checks.logger.warning_once", messages.append)
    inputs = make_processor(model.config)(text="<image>a", images=image_of(24, 48), return_tensors="pt")
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    expected = model(input_ids=ids, **inputs).logits
    assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, expected)
    assert not messages
    types = inputs["mm_token_type_ids"]
    model(inputs_embeds=embeds, mm_token_type_ids=types)
    assert len(messages) == 1
    assert "the DeepStack features are missing: pass `pixel_values`" in messages[0]


@pytest.mark.parametrize(
    ("vision", "fields", "message"),
    [
        ({}, {"use_deepstack": "yes"}, "`use_deepstack` must be True or False"),
        (MERGING["qwen2"], {"use_deepstack": True}, r"`vision_config` \(qwen2_vl_vision\) has no DeepStack features"),
        ({"deepstack_visual_indexes": []}, {"use_deepstack": True}, "has no DeepStack features"),
        ({"deepstack_visual_indexes": [0, 3]}, {"use_deepstack": True}, r"indexes` names layers \[3\].* layers 0 to 2"),
        ({"deepstack_visual_indexes": [1, 1]}, {"use_deepstack": True}, "deepstack_visual_indexes` repeats a value"),
        (
            {"deepstack_visual_indexes": [0, 1, 2]},
            {"use_deepstack": True},
            "adds 3 levels of features after as many layers, but `text_config.num_hidden_layers` is 2",
        ),
    ],
)
def test_invalid_configurations(vision, fields, message):
    vision = vision if "model_type" in vision else TOWER | vision
    fields = {"image_sizing": "native", "pixel_shuffle_factor": 1} | fields
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmConfig(text_config=TEXT_CONFIG, vision_config=vision, **fields)


def test_as_many_levels_as_layers():
    config = make_config("qwen3", vision_config=TOWER, use_deepstack=True)
    assert config.text_config.num_hidden_layers == len(config.vision_config.deepstack_visual_indexes) == 2
    projector = SparseMoeVlmForConditionalGeneration(config).model.multi_modal_projector
    assert len(projector.deepstack_projectors) == 2
