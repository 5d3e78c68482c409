"""Vision towers that read lists of patches of any size: SigLIP 2 (NaFlex), Pixtral, and those of Qwen2-VL and later."""

import copy
import inspect
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from modeling_sparse_moe_vlm import (
    SparseMoeVlmConfig,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmProcessor,
    native_towers,
)
from modeling_sparse_moe_vlm.image_patches import to_patches
from modeling_sparse_moe_vlm.native_encoding import merged_inputs, padded_inputs, sized_inputs
from modeling_sparse_moe_vlm.native_towers import (
    check_native_tower,
    feature_size_of,
    native_inputs,
    num_channels_of,
    patches_per_side,
)
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, TINY_TOWER, VISION_CONFIG
from tests.support.processors import VOCAB_SIZE, make_image, make_image_processor, make_tokenizer
from tests.support.rows_and_batches import check_rows_of_batch

OF_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
OF_LATER = OF_QWEN | {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 24}
MERGING = {
    "qwen2": OF_QWEN | {"model_type": "qwen2_vl_vision", "embed_dim": 32, "hidden_size": 24},
    "qwen2_5": OF_LATER | {"model_type": "qwen2_5_vl_vision", "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3": OF_LATER
    | {"model_type": "qwen3_vl_vision", "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
NAFLEX = {name: value for name, value in TINY_TOWER.items() if name != "image_size"} | {
    "model_type": "siglip2_vision_model",
    "num_patches": 16,
    "vision_use_head": False,
}
PIXTRAL = TINY_TOWER | {"model_type": "pixtral"}
TOWERS = {"naflex": NAFLEX, "pixtral": PIXTRAL, **MERGING}
SIZES = [(24, 48), (20, 50), (48, 24), (1, 90), (24, 48), (30, 30)]


def make_config(tower: str, **fields) -> SparseMoeVlmConfig:
    fields = {"image_sizing": "native", "pixel_shuffle_factor": 1 if tower in MERGING else 2} | fields
    text = TEXT_CONFIG | {"vocab_size": VOCAB_SIZE, "modalities": fields.pop("modalities", ["text", "image"])}
    fields = {"vision_config": TOWERS[tower], "image_token_id": IMAGE_TOKEN_ID} | fields
    return SparseMoeVlmConfig(text_config=text, **fields)


def make_model(tower: str, **fields) -> SparseMoeVlmForConditionalGeneration:
    torch.manual_seed(0)
    return SparseMoeVlmForConditionalGeneration(make_config(tower, **fields)).eval()


def make_processor(config, image_processor=None, **kwargs) -> SparseMoeVlmProcessor:
    arguments = config.image_arguments | {"max_image_tokens": 30} | kwargs
    return SparseMoeVlmProcessor(image_processor or make_image_processor(), make_tokenizer(), **arguments)


def image_of(height: int, width: int):
    return make_image(height * 1000 + width, width, height)


@pytest.fixture(scope="module", params=TOWERS)
def model(request):
    return make_model(request.param)


# ------------------------------------------------------------------------------------------------ features


def test_naflex_features_are_those_of_the_encoder():
    """For an image as its own image processor cuts it into patches."""
    model = make_model("naflex")
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=72)
    processor = make_processor(model.config, image_processor)
    image = image_of(24, 48)
    official = image_processor(image, return_tensors="pt")
    assert official["spatial_shapes"].tolist() == [[6, 12]]
    names = ["pixel_values", "input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"]
    assert sorted(processor.model_input_names) == sorted(names)
    inputs = processor(images=image, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 12]]
    with torch.no_grad():
        features = model.model.vision_tower(**official).last_hidden_state[0]
        outputs = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert torch.equal(outputs.last_hidden_state, features)
    assert [tokens.shape for tokens in outputs.pooler_output] == [(18, 32)]


def test_pixtral_features_are_those_of_the_encoder():
    """For images as its own image processor resizes and pads them."""
    model = make_model("pixtral")
    image_processor = PixtralImageProcessorPil(patch_size=4, size={"longest_edge": 48})
    processor = make_processor(model.config, image_processor)
    images = [image_of(24, 48), image_of(48, 16)]
    official = image_processor(images, return_tensors="pt")
    assert official["image_sizes"].tolist() == [[24, 48], [48, 16]]
    inputs = processor(images=images, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 12], [1, 12, 4]]
    with torch.no_grad():
        features = model.model.vision_tower(**official).last_hidden_state[0]
        outputs = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert features.shape == (72 + 48, 16)
    assert torch.equal(outputs.last_hidden_state, features)
    assert [tokens.shape for tokens in outputs.pooler_output] == [(18, 32), (12, 32)]


@pytest.mark.parametrize("name", MERGING)
def test_merged_features_are_those_of_the_encoder(name):
    """For an image as its own image processor cuts it into patches."""
    model = make_model(name)
    image_processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=10_000)
    processor = make_processor(model.config, image_processor)
    image = image_of(24, 48)
    official = image_processor(image, return_tensors="pt")
    assert official["image_grid_thw"].tolist() == [[1, 6, 12]]
    inputs = processor(images=image, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 12]]
    assert inputs["pixel_values"].shape == (72, 48)
    connector = model.model.multi_modal_projector
    with torch.no_grad():
        tower = model.model.vision_tower
        features = tower(official["pixel_values"], grid_thw=official["image_grid_thw"]).pooler_output
        outputs = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        tokens = connector.linear_2(connector.act(connector.linear_1(features)))
    assert features.shape == (18, 24)
    assert torch.equal(outputs.last_hidden_state, features)
    assert len(outputs.pooler_output) == 1
    assert torch.equal(outputs.pooler_output[0], tokens)


def test_features_on_their_own_and_in_a_batch(model):
    processor = make_processor(model.config)
    images = [image_of(*size) for size in SIZES]
    batch = processor(images=images, return_tensors="pt")
    known = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    with torch.no_grad():
        together = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
        assert [len(tokens) for tokens in together] == known["num_image_tokens"]
        for image, tokens in zip(images, together, strict=True):
            own = processor(images=image, return_tensors="pt")
            (alone,) = model.get_image_features(own["pixel_values"], own["image_grid_thw"]).pooler_output
            torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-5)


def test_inputs_of_naflex_towers():
    config = make_config("naflex").vision_config
    images = [torch.randn(3, 8, 12), torch.randn(3, 16, 4)]
    inputs = padded_inputs(torch.cat([to_patches(image[None], 4) for image in images]), [(2, 3), (4, 1)], config)
    assert inputs["spatial_shapes"].tolist() == [[2, 3], [4, 1]]
    assert inputs["pixel_attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    for number, image in enumerate(images):
        expected = torch.tensor(convert_image_to_patches(image.numpy(), 4))
        assert torch.equal(inputs["pixel_values"][number, : len(expected)], expected)
    assert not inputs["pixel_values"][1, 4:].any()


def test_inputs_of_pixtral():
    config = make_config("pixtral").vision_config
    images = [torch.randn(3, 8, 12), torch.randn(3, 16, 4)]
    inputs = sized_inputs(torch.cat([to_patches(image[None], 4) for image in images]), [(2, 3), (4, 1)], config)
    assert inputs["image_sizes"] == [(8, 12), (16, 4)]
    assert inputs["pixel_values"].shape == (2, 3, 16, 12)
    assert torch.equal(inputs["pixel_values"][0, :, :8], images[0])
    assert torch.equal(inputs["pixel_values"][1, :, :, :4], images[1])
    assert not inputs["pixel_values"][0, :, 8:].any()
    assert not inputs["pixel_values"][1, :, :, 4:].any()


def test_pixtral_without_rotary_positions_of_other_images():
    """The position of a patch depends only on its row and column in its own image."""
    model = make_model("pixtral")
    images = torch.rand(2, 3, 8, 16), torch.rand(1, 3, 16, 8)
    patches = torch.cat([to_patches(each, 4) for each in images])
    grids = torch.tensor([(1, 2, 4), (1, 2, 4), (1, 4, 2)])
    with torch.no_grad():
        features = model.get_image_features(patches, grids).last_hidden_state
        own = [model.model.vision_tower(image[None]).last_hidden_state[0] for each in images for image in each]
    torch.testing.assert_close(features, torch.cat(own), rtol=1e-5, atol=1e-5)


def test_inputs_of_merging_towers():
    config = make_config("qwen3").vision_config
    image = torch.arange(4 * 6).float().view(4, 6)  # a grid of patches
    patches = image.view(24, 1).expand(24, 48).contiguous()
    patches[:, 0] += 0.5  # the first value of a patch is of its first frame and of its second
    frames, grid = merged_inputs(torch.cat([patches, patches[:4] + 100]), [(4, 6), (2, 2)], config)
    assert grid.tolist() == [[1, 4, 6], [1, 2, 2]]
    assert frames.shape == (28, 96)
    order = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    assert frames[:, 1].tolist() == [*order, 100, 101, 102, 103]
    red, green = frames[:, :32].view(28, 2, 16), frames[:, 32:64].view(28, 2, 16)
    assert torch.equal(red[:, 0], red[:, 1])
    assert (red[:, :, 0] - red[:, :, 1] == 0.5).all()
    assert (green[:, :, 0] == green[:, :, 1]).all()


# ------------------------------------------------------------------------------------------------ models


def test_batches_and_generation(model):
    processor = make_processor(model.config)
    images = [[image_of(45, 70), image_of(20, 20)], [], [image_of(60, 30)]]
    check_rows_of_batch(model, processor, images)


@pytest.mark.parametrize("name", TOWERS)
def test_a_training_step(name):
    model = make_model(name).train()
    batch = make_processor(model.config)(
        text=["<image>a", "b<image>"], images=[image_of(20, 50), image_of(30, 30)], padding=True, return_tensors="pt"
    )
    model(**batch, labels=batch["input_ids"]).loss.backward()
    unused = {name for name, own in model.named_parameters() if own.requires_grad and own.grad is None}
    assert all("deepstack_merger_list" in name for name in unused)
    assert bool(unused) == (name == "qwen3")


@pytest.mark.parametrize("name", ["siglip", *TOWERS])
def test_the_signature_is_read_once(name, monkeypatch):
    """When the model is created, not when it runs. Copies and pickles keep what was read."""
    if name == "siglip":
        fields = {"vision_config": VISION_CONFIG, "image_sizing": "native", "pixel_shuffle_factor": 1}
        model = SparseMoeVlmForConditionalGeneration(SparseMoeVlmConfig(text_config=TEXT_CONFIG, **fields)).eval()
    else:
        model = make_model(name)
    pixels = torch.rand(1, 3, 16, 24)
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    monkeypatch.setattr(inspect, "signature", lambda *_, **__: pytest.fail("the signature is read again"))
    with torch.no_grad():
        features = [each.model.get_image_features(pixels).last_hidden_state for each in copies]
    assert features[0].std() > 0
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


def test_processes_have_gradients_of_all_weights(monkeypatch):
    """Data parallelism waits for those of the mergers of earlier layers. Their gradients are zero."""
    model = make_model("qwen3", vision_config=TOWERS["qwen3"] | {"deepstack_visual_indexes": [0, 1]}).train()
    pixels = torch.randn(2, 3, 24, 16)
    expected = torch.stack(model.get_image_features(pixels).pooler_output)
    monkeypatch.setattr("modeling_sparse_moe_vlm.visual_features.is_one_of_several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number, op: None)
    actual = torch.stack(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    grads = {name: own.grad for name, own in model.model.vision_tower.named_parameters() if "deepstack" in name}
    assert len(grads) == 12
    assert all(grad.abs().max() == 0 for grad in grads.values())


@pytest.mark.parametrize("name", ["naflex", "pixtral", "qwen2_5"])
def test_half_precision(name):
    model = make_model(name)
    inputs = make_processor(model.config)(text="<image>", images=image_of(20, 50), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = model.to(torch.bfloat16)(**inputs).logits
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("name", ["naflex", "pixtral", "qwen2"])
def test_save_and_load(name, tmp_path):
    model = make_model(name)
    processor = make_processor(model.config)
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["vision_config"]["model_type"] == TOWERS[name]["model_type"]
    )
    inputs = processor(text="<image>", images=image_of(20, 50), return_tensors="pt")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded.model.vision_tower) is type(model.model.vision_tower)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["naflex", "qwen3"])
def test_frames_of_videos_are_squares(name):
    config = make_config(name, video_token_id=1, modalities=["text", "image", "video"], video_temporal_pooling=2)
    torch.manual_seed(0)
    model = SparseMoeVlmForConditionalGeneration(config).eval()
    processor = make_processor(config, video_token="<|im_start|>", video_temporal_pooling=2)
    side = 16  # the square of the tower: 4 × 4 patches
    video = np.random.default_rng(0).integers(0, 256, (4, 20, 50, 3), dtype=np.uint8)
    inputs = processor(text="<|im_start|>?", videos=video, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (4, 3, side, side)
    assert (inputs["mm_token_type_ids"] == 2).sum() == 2 * config.image_seq_length
    with torch.no_grad():
        frames = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        images = torch.stack(model.get_image_features(inputs["pixel_values_videos"]).pooler_output)
        assert model(**inputs).logits.isfinite().all()
    torch.testing.assert_close(torch.stack(list(frames)), images.unflatten(0, (2, 2)).mean(dim=1))
    expected = make_image_processor()([*video], size={"height": side, "width": side}, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values"])


# ------------------------------------------------------------------------------------------------ configurations


def test_arguments_of_the_processor():
    native = {"image_sizing": "native", "patch_size": 4, "merge_size": 2}
    arguments = {name: make_config(name).image_arguments for name in TOWERS}
    # A square of 16 patches, of 32 × 32 patches if the configuration names no size, or of 16 positions.
    assert arguments == {
        "naflex": native | {"image_seq_length": 4},
        "pixtral": native | {"image_seq_length": 4},
        "qwen2": native | {"image_seq_length": 256},
        "qwen2_5": native | {"image_seq_length": 256},
        "qwen3": native | {"image_seq_length": 4},
    }
    assert make_config("qwen3", pixel_shuffle_factor=2).image_arguments == native | {
        "image_seq_length": 1,
        "merge_size": 4,
    }
    assert {name: native_inputs(make_config(name).vision_config) for name in TOWERS} == {
        "naflex": "spatial_shapes",
        "pixtral": "image_sizes",
        **dict.fromkeys(MERGING, "grid_thw"),
    }


def test_names_of_the_inputs():
    """Image processors that cut images into patches themselves have other names."""
    names = ["input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"]
    for image_processor in (None, Siglip2ImageProcessorPil(patch_size=4), Qwen2VLImageProcessorPil(patch_size=4)):
        found = make_processor(make_config("qwen3"), image_processor).model_input_names
        assert sorted(found) == sorted(names)


@pytest.mark.parametrize(
    ("tower", "fields", "side"),
    [("qwen3", {}, 8), ("qwen3", {"pixel_shuffle_factor": 2}, 16), ("naflex", {}, 8)],
)
def test_blank_images_have_one_token(tower, fields, side):
    model = make_model(tower, **fields).model
    assert model._blank_images().shape == (1, 3, side, side)
    assert [len(tokens) for tokens in model.get_image_features(model._blank_images()).pooler_output] == [1]


def test_the_connector_merges_merged_features_again():
    model = make_model("qwen2_5", pixel_shuffle_factor=2)
    pixels = torch.randn(1, 3, 32, 48)  # 8 × 12 patches, which the tower merges to 4 × 6
    connector = model.model.multi_modal_projector
    with torch.no_grad():
        outputs = model.get_image_features(pixels)
        features = outputs.last_hidden_state.view(2, 2, 3, 2, 24).transpose(1, 2).reshape(6, 96)
        tokens = connector.linear_2(connector.act(connector.linear_1(features)))
    assert torch.equal(outputs.pooler_output[0], tokens)


@pytest.mark.parametrize(
    "values",
    [
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 0, "rescale_factor": 0.01},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
)
@pytest.mark.parametrize("of_tower", [Siglip2ImageProcessorPil, Qwen2VLImageProcessorPil, PixtralImageProcessorPil])
def test_pixels_of_image_processors_that_cut_patches(of_tower, values):
    """Another image processor resizes the images, with the same values."""
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2} | values
    processor = make_processor(make_config("naflex"), of_tower(patch_size=4, **values))
    image = image_of(23, 50)
    size = {"height": 24, "width": 48}
    expected = SiglipImageProcessorPil(**values)(image, size=size, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"], to_patches(expected, 4))


def test_numbers_of_channels():
    config = make_config("qwen3").vision_config
    assert num_channels_of(config) == 3
    config.in_channels = 4
    assert num_channels_of(config) == 4
    config.num_channels = 2
    assert num_channels_of(config) == 2
    assert num_channels_of(make_config("naflex").vision_config) == 3


def test_only_mergers_set_the_size_of_features():
    for name in MERGING:
        assert feature_size_of(make_config(name).vision_config) == 24
    config = make_config("naflex").vision_config
    config.out_hidden_size = 24
    assert feature_size_of(config) == config.hidden_size


@pytest.mark.parametrize("name", MERGING)
def test_mergers_of_single_patches(name):
    """The tower still has a merger, which sets the size of the features."""
    fields = {"text_config": TEXT_CONFIG, "vision_config": MERGING[name] | {"spatial_merge_size": 1}}
    model = SparseMoeVlmForConditionalGeneration(
        SparseMoeVlmConfig(**fields, image_sizing="native", pixel_shuffle_factor=1)
    ).eval()
    assert model.model.multi_modal_projector.linear_1.in_features == 24
    with torch.no_grad():
        tokens = model.get_image_features(torch.rand(6, 48), torch.tensor([(1, 2, 3)])).pooler_output
    assert [image.shape for image in tokens] == [(6, TEXT_CONFIG["hidden_size"])]


@pytest.mark.parametrize(
    ("vision", "fields", "message"),
    [
        (MERGING["qwen3"], {"image_sizing": "fixed"}, r'merges their patches: set `image_sizing="native"`, or choose'),
        (NAFLEX, {"image_sizing": "fixed"}, r'takes images as lists of patches: set `image_sizing="native"`'),
        (
            MERGING["qwen3"],
            {"vision_feature_layer": -2},
            r"`vision_feature_layer` \(-2\) must be left out: .* merges the patches of its last layer",
        ),
        (MERGING["qwen3"] | {"spatial_merge_size": 1}, {"vision_feature_layer": -2}, "must be left out"),
        (
            OF_LATER | {"model_type": "glm_image_vision"},
            {},
            r"takes the inputs \['pixel_values', 'grid_thw'\], but .* passes \['grid_thw', 'hidden_states'\]",
        ),
        (
            OF_LATER | {"model_type": "video_llama_3_vision"},
            {},
            r"takes the inputs \['pixel_values', 'grid_thw', 'merge_sizes'",
        ),
        (PIXTRAL, {"image_sizing": "fixed"}, r'packs images of any size: set `image_sizing="native"`, or choose'),
        (
            PIXTRAL | {"num_attention_heads": 16},
            {},
            r"hidden_size` \(16\) must be a multiple of 4 · `num_heads` \(16\)",
        ),
        (PIXTRAL | {"patch_size": [4, 4]}, {}, r"`vision_config.patch_size` must be an integer"),
        (NAFLEX | {"num_patches": 0}, {}, "`vision_config.num_patches` must be an integer of at least 1, got 0"),
        (MERGING["qwen3"] | {"num_position_embeddings": 0}, {}, "`vision_config.num_position_embeddings` must be"),
        (VISION_CONFIG | {"image_size": 0}, {}, "`vision_config.image_size` must be an integer of at least 1, got 0"),
        (MERGING["qwen2"] | {"temporal_patch_size": 0}, {}, "`vision_config.temporal_patch_size` must be"),
        (MERGING["qwen2"] | {"spatial_merge_size": 0}, {}, "`vision_config.spatial_merge_size` must be"),
        (MERGING["qwen3"] | {"num_heads": 0}, {}, "`vision_config.num_heads` must be an integer of at least 1, got 0"),
        (MERGING["qwen3"] | {"num_heads": 3}, {}, r"hidden_size` \(32\) must be a multiple of 4 · `num_heads` \(3\)"),
        (MERGING["qwen3"] | {"num_heads": 16}, {}, r"hidden_size` \(32\) must be a multiple of 4 · `num_heads` \(16\)"),
        (MERGING["qwen2"] | {"embed_dim": 36}, {}, r"embed_dim` \(36\) must be a multiple of 4 · `num_heads` \(2\)"),
        (MERGING["qwen3"] | {"out_hidden_size": 0}, {}, "`vision_config.out_hidden_size` must be"),
        (MERGING["qwen2_5"] | {"window_size": 7}, {}, "`vision_config.window_size` must be an integer of at least 8"),
        (
            OF_LATER | {"model_type": "exaone4_5_vision"},  # 8 heads of keys and values by default
            {},
            r"`vision_config.num_key_value_heads` \(8\) must divide `num_heads` \(2\)",
        ),
        (
            OF_LATER | {"model_type": "exaone4_5_vision", "num_key_value_heads": 0},
            {},
            "`vision_config.num_key_value_heads` must be an integer of at least 1, got 0",
        ),
        (MERGING["qwen3"], {"pixel_shuffle_factor": 3}, "one token of 6 × 6 patches, but .* into 4 × 4"),
        ({"model_type": "blip_vision_model"}, {}, r"\(blip_vision_model\) has no model that `AutoModel` creates"),
    ],
)
def test_invalid_configurations(vision, fields, message):
    fields = {"image_sizing": "native", "pixel_shuffle_factor": 1} | fields
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmConfig(text_config=TEXT_CONFIG, vision_config=vision, **fields)


def test_a_size_of_heads_need_not_divide_the_width():
    config = make_config("qwen3").vision_config
    config.num_heads = 3
    with pytest.raises(ValueError, match="must be a multiple of 4 · `num_heads`"):
        check_native_tower(config)
    config.head_dim = 8
    check_native_tower(config)


@pytest.mark.parametrize("vision", [PIXTRAL, VISION_CONFIG])
def test_faults_of_towers_are_reported(vision, monkeypatch):
    monkeypatch.setattr(native_towers, "_fault_of_tower", lambda *_: "it fails.")
    with pytest.raises(ValueError, match=r"does not take images of any size, .* needs: it fails\. Leave out"):
        SparseMoeVlmConfig(text_config=TEXT_CONFIG, vision_config=vision, image_sizing="native")


def test_patches_per_side():
    config = make_config("naflex").vision_config
    config.num_patches = 30  # a square of 25 patches
    assert patches_per_side(config) == 5
    config.image_size = 15  # 3 patches of 4 pixels
    assert patches_per_side(config) == 3


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda self, hidden_states, grid_thw, ids: None,
            r"takes the inputs \['hidden_states', 'grid_thw', 'ids'\], but",
        ),
        (lambda self, pixel_values, ids, mask=None: None, r"takes the inputs \['pixel_values', 'ids', 'mask'\], but"),
        (lambda self, pixel_values, spatial_shapes: None, r"passes \['pixel_attention_mask', 'pixel_values', 'spatial"),
        (lambda self, pixel_values, mask=None, **kwargs: None, None),
    ],
)
def test_towers_with_other_inputs(forward, message, monkeypatch):
    config = make_config("naflex").vision_config
    monkeypatch.setattr(native_towers, "_tower_class", lambda _: type("Tower", (), {"forward": forward}))
    if message is None:
        assert native_inputs(config) == "pixel_values"
        return
    with pytest.raises(ValueError, match=message):
        native_inputs(config)


@pytest.mark.parametrize(
    ("shape_of", "is_taken", "is_taken_with_sizes"),
    [
        (lambda rows, columns: (2, rows * columns + 1, 8), True, True),  # a class token
        (lambda rows, columns: (2, 2 * rows * columns, 8), False, False),
        (lambda rows, columns: (2, rows * columns - 1, 8), False, False),
        (lambda rows, columns: (2, rows * rows, 8), False, False),
        (lambda rows, columns: (1, 2 * rows * columns, 8), False, True),
        (lambda rows, columns: (1, rows * columns, 8), False, False),
        (lambda rows, columns: (2, rows * columns, 2, 4), False, False),
    ],
)
def test_towers_are_tried_without_weights(shape_of, is_taken, is_taken_with_sizes, monkeypatch):
    config = make_config("naflex").vision_config
    config.num_hidden_layers = 3

    class Tower(torch.nn.Module):
        def from_config(config, attn_implementation):
            assert (config.num_hidden_layers, attn_implementation) == (1, "eager")
            assert torch.get_default_device().type == "meta"
            return Tower()

        def forward(self, pixel_values, image_sizes=None, return_dict=False):
            assert return_dict
            assert not self.training
            assert pixel_values.shape[:2] == (2, 3)
            height, width = pixel_values.shape[2:]
            assert image_sizes == ([(height, width)] * 2 if has_sizes else None)
            return SimpleNamespace(last_hidden_state=torch.zeros(shape_of(height // 4, width // 4)))

    monkeypatch.setattr(native_towers, "AutoModel", Tower)
    monkeypatch.setattr(native_towers, "_tower_class", lambda _: Tower)
    for has_sizes, expected in ((False, is_taken), (True, is_taken_with_sizes)):
        inputs = native_towers.TowerInputs("image_sizes" if has_sizes else "pixel_values", False)
        monkeypatch.setattr(native_towers.TowerInputs, "of", lambda _, inputs=inputs: inputs)
        fault = native_towers._fault_of_tower.__wrapped__(type(config), config.to_json_string())
        assert fault == (None if expected else "it does not return one feature per patch.")


def test_towers_of_a_fixed_size_are_created_as_before():
    model = SparseMoeVlmForConditionalGeneration(
        SparseMoeVlmConfig(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG)
    )
    assert type(model.model.vision_tower).__name__ == "SiglipVisionModel"
