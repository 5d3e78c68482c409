"""Images of native sizes: the processor's tokens are known beforehand, and the features are those of the encoder."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from transformers import AutoModelForImageTextToText, ViTImageProcessorPil

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor
from modeling_sparse_moe_vlm.image_patches import to_images, to_patches
from modeling_sparse_moe_vlm.native_encoding import features_by_size
from modeling_sparse_moe_vlm.native_towers import native_inputs
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, TINY_TOWER, VISION_CONFIG
from tests.support.processors import VOCAB_SIZE, make_image, make_image_processor, make_tokenizer, user
from tests.support.rows_and_batches import check_rows_of_batch

TOWERS = {
    "siglip": VISION_CONFIG,
    "clip": TINY_TOWER | {"model_type": "clip_vision_model"},
    "vit": TINY_TOWER | {"model_type": "vit"},
    "dinov2": TINY_TOWER | {"model_type": "dinov2"},
    "dinov2_with_registers": TINY_TOWER | {"model_type": "dinov2_with_registers"},
    "dinov3": TINY_TOWER | {"model_type": "dinov3_vit"},
    "idefics3": TINY_TOWER | {"model_type": "idefics3_vision"},
}
SEPARATOR = "<|im_start|>"
# Heights and widths of images of every orientation; two have the same number of tokens.
SIZES = [(20, 50), (50, 20), (30, 30), (1, 90), (90, 1), (1, 1), (47, 64), (20, 50)]


def make_native_config(tower: str = "siglip", **fields) -> SparseMoeVlmConfig:
    text = TEXT_CONFIG | {"vocab_size": VOCAB_SIZE}
    fields = {"image_sizing": "native", "image_token_id": IMAGE_TOKEN_ID} | fields
    return SparseMoeVlmConfig(text_config=text, vision_config=TOWERS[tower], **fields)


def make_native_model(tower: str = "siglip", **fields) -> SparseMoeVlmForConditionalGeneration:
    torch.manual_seed(0)
    return SparseMoeVlmForConditionalGeneration(make_native_config(tower, **fields)).eval()


def make_native_processor(config=None, image_processor=None, **kwargs) -> SparseMoeVlmProcessor:
    arguments = (config or make_native_config()).image_arguments | {"max_image_tokens": 30} | kwargs
    return SparseMoeVlmProcessor(image_processor or make_image_processor(), make_tokenizer(), **arguments)


def image_of(height: int, width: int) -> Image.Image:
    return make_image(height * 1000 + width, width, height)


def pixels_of(image: Image.Image, height: int, width: int, image_processor=None) -> torch.Tensor:
    """Returns the pixels `(1, 3, height, width)` of an image as its image processor makes them."""
    size = {"height": height, "width": width}
    return (image_processor or make_image_processor())(image, size=size, return_tensors="pt")["pixel_values"]


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((8, 8), (1, 1)),
        ((20, 50), (3, 6)),  # 2.5 and 6.25 tokens of 8 pixels
        ((11, 12), (1, 2)),  # 1.375 and 1.5
        ((1, 90), (1, 11)),
        ((90, 1), (11, 1)),
        ((1, 1), (1, 1)),
        ((40, 48), (5, 6)),  # 30 tokens, the limit
        ((40, 56), (5, 6)),  # 35 tokens are too many
        ((400, 400), (5, 5)),
        ((4000, 30), (30, 1)),
        ((1, 10_000), (1, 30)),
    ],
)
def test_sizes_are_rounded_to_whole_tokens(size, grid):
    assert make_native_processor().token_grid(*size) == grid
    assert make_native_processor().tile_grid(*size) == (1, 1)


def test_limits_on_the_number_of_tokens():
    with pytest.raises(ValueError, match="an image of 0 × 5 pixels has no pixels"):
        make_native_processor().token_grid(0, 5)
    processor = make_native_processor()
    most = {
        10_000: (13, 25),
        300: (12, 25),
        299: (12, 24),
        60: (5, 11),
        12: (2, 5),
        8: (2, 4),
        3: (1, 3),
        2: (1, 2),
        1: (1, 1),
    }
    assert {limit: processor.token_grid(100, 200, max_image_tokens=limit) for limit in most} == most
    fewest = {1: (1, 2), 2: (1, 2), 3: (1, 3), 7: (2, 4), 9: (2, 5), 30: (4, 8), 31: (4, 8), 33: (4, 9)}
    grids = {least: processor.token_grid(8, 17, min_image_tokens=least, max_image_tokens=99) for least in fewest}
    assert grids == fewest
    # The smallest grid of at least 3 tokens has too many, so the image gets fewer.
    assert processor.token_grid(8, 8, min_image_tokens=3, max_image_tokens=4) == (2, 2)
    assert processor.token_grid(8, 8, min_image_tokens=3, max_image_tokens=3) == (1, 1)
    assert processor.token_grid(8, 12, min_image_tokens=5, max_image_tokens=5) == (2, 2)  # not (1, 2), its own size
    stored = make_native_processor(min_image_tokens=9, max_image_tokens=20)
    assert stored.token_grid(8, 8) == (3, 3)
    assert stored.token_grid(100, 100) == (4, 4)
    assert stored.token_grid(8, 8, min_image_tokens=1) == (1, 1)
    # By default, an image has at most as many tokens as a square of the size of the tower.
    assert make_native_processor(max_image_tokens=None).token_grid(100, 100) == (2, 2)
    assert make_native_processor(max_image_tokens=None).token_grid(8, 100) == (1, 4)


def test_separators_count_as_tokens():
    processor = make_native_processor(row_separator=SEPARATOR)
    assert processor.token_grid(40, 40) == (5, 5)  # 5 · (5 + 1) = 30
    assert processor.token_grid(40, 40, max_image_tokens=29) == (4, 4)
    assert processor.token_grid(400, 1) == (15, 1)
    inputs = processor(text="<image>", images=image_of(16, 24), return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[3, 3, 3, 1, 3, 3, 3, 1]]
    assert inputs["mm_token_type_ids"].tolist() == [[1, 1, 1, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize("options", [{}, {"row_separator": SEPARATOR}, {"min_image_tokens": 12, "merge_size": 1}])
def test_numbers_of_tokens_of_thousands_of_images(options):
    processor = make_native_processor(**options)
    side = 4 * processor.merge_size
    number = 2_000 if options else 10_000
    sizes = np.random.default_rng(0).integers(1, 150, (number, 2)).tolist()
    known = processor._get_num_multimodal_tokens(image_sizes=sizes)
    tokens, patches = known["num_image_tokens"], known["num_image_patches"]
    has_separators = "row_separator" in options
    assert max(tokens) <= 30
    for i, (height, width) in enumerate(sizes[:1000]):
        rows, columns = processor.token_grid(height, width)
        assert tokens[i] == rows * (columns + has_separators)
        assert patches[i] == rows * columns * processor.merge_size**2
        nearest = [max(1, int(length / side + 0.5)) for length in (height, width)]
        if options.get("min_image_tokens", 1) <= nearest[0] * (nearest[1] + has_separators) <= 30:
            assert [rows, columns] == nearest
    few = range(0, number, 100)
    inputs = processor(text=["<image>"] * len(few), images=[Image.new("RGB", sizes[i][::-1]) for i in few])
    assert [len(row) for row in inputs["input_ids"]] == [tokens[i] for i in few]
    assert [int(np.prod(grid)) for grid in inputs["image_grid_thw"]] == [patches[i] for i in few]
    assert len(inputs["pixel_values"]) == sum(patches[i] for i in few)


def test_the_same_inputs_on_their_own_and_in_a_batch():
    processor = make_native_processor()
    images = [image_of(*size) for size in SIZES]
    batch = processor(text=["<image>"] * len(SIZES), images=images)
    known = processor._get_num_multimodal_tokens(image_sizes=SIZES, max_image_tokens=30)
    assert [len(row) for row in batch["input_ids"]] == known["num_image_tokens"]
    singles = [processor(text="<image>", images=image) for image in images]
    assert [single["input_ids"][0] for single in singles] == batch["input_ids"]
    assert [single["image_grid_thw"][0] for single in singles] == batch["image_grid_thw"]
    assert np.array_equal(
        np.concatenate([single["pixel_values"] for single in singles]), np.stack(batch["pixel_values"])
    )


@pytest.mark.parametrize(
    "image_processor", [make_image_processor(), ViTImageProcessorPil(size={"height": 9, "width": 9})]
)
def test_patches_are_those_of_the_resized_image(image_processor):
    processor = make_native_processor(image_processor=image_processor)
    image = image_of(20, 50)
    inputs = processor(text="<image>", images=image, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 12]]
    assert inputs["input_ids"].tolist() == [[IMAGE_TOKEN_ID] * 18]
    expected = pixels_of(image, 24, 48, image_processor)[0]
    assert torch.equal(to_images(inputs["pixel_values"], (6, 12), 4)[0], expected)
    patch = inputs["pixel_values"].view(6, 12, 3, 4, 4)[4, 7]
    assert torch.equal(patch, expected[:, 16:20, 28:32])
    image_processor.do_resize = False  # images still become whole tokens
    assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"], inputs["pixel_values"])
    assert sorted(inputs) == ["attention_mask", "image_grid_thw", "input_ids", "mm_token_type_ids", "pixel_values"]
    assert set(inputs) <= set(processor.model_input_names)


def test_patches_and_images_are_inverse():
    images = torch.randn(2, 3, 8, 12)
    patches = to_patches(images, 4)
    assert patches.shape == (12, 48)
    assert torch.equal(patches[7], images[1, :, :4, 4:8].flatten())
    assert torch.equal(to_images(patches, (2, 3), 4), images)


def test_images_in_conversations_and_options_of_a_call():
    processor = make_native_processor()
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([user(image_of(20, 50), "What?")], **kwargs)
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == 18
    options = {"processor_kwargs": {"max_image_tokens": 8}}
    inputs = processor.apply_chat_template([user(image_of(20, 50), "What?")], **kwargs, **options)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8]]
    floats = np.random.default_rng(0).random((20, 50, 3)).astype("float32")
    as_floats = processor(images=floats, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert as_floats.shape == (72, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tiles": 2}, r"`max_tiles=2` cannot be combined with `image_sizing=\"native\"`"),
        ({"min_tiles": 2}, "`min_tiles=2` cannot be combined"),
        ({"do_pad": True}, "`do_pad=True` cannot be combined"),
        ({"max_image_tokens": 0}, "`max_image_tokens` must be an integer of at least 1, got 0"),
        ({"min_image_tokens": 0}, "`min_image_tokens` must be an integer of at least 1, got 0"),
        ({"min_image_tokens": 31}, r"`min_image_tokens` \(31\) must not be larger than `max_image_tokens` \(30, "),
        ({"size": {"height": 8, "width": 8}}, "`size` cannot be combined .* limit the size of images"),
        ({"crop_size": {"height": 8, "width": 8}}, "`crop_size` cannot be combined"),
    ],
)
def test_invalid_options(options, message):
    if not {"size", "crop_size"} & options.keys():
        with pytest.raises(ValueError, match=message):
            make_native_processor(**options)
    with pytest.raises(ValueError, match=message):
        make_native_processor()(text="<image>", images=make_image(), **options)


def test_images_of_native_sizes_are_one_tile():
    assert make_native_processor().tile_grid(20, 50) == (1, 1)
    assert make_native_processor().token_grid(20, 50) == (3, 6)


def test_invalid_processors():
    with pytest.raises(ValueError, match=r"`image_sizing` must be one of .*, got 'any'"):
        make_native_processor(image_sizing="any")
    with pytest.raises(ValueError, match="`patch_size` must be an integer of at least 1, got None"):
        make_native_processor(patch_size=None)
    with pytest.raises(ValueError, match="`merge_size` must be an integer of at least 1, got None"):
        make_native_processor(merge_size=None)
    with pytest.raises(ValueError, match="`max_image_tokens` is 1, but the smallest image has 2 tokens"):
        make_native_processor(max_image_tokens=1, row_separator=SEPARATOR)
    fixed = {"image_sizing": "fixed", "max_image_tokens": None}
    with pytest.raises(ValueError, match=r"`min_image_tokens` needs `image_sizing=\"native\"`"):
        make_native_processor(**fixed, min_image_tokens=2)
    with pytest.raises(ValueError, match=r"`min_image_tokens` needs `image_sizing=\"native\"`"):
        make_native_processor(**fixed)(images=make_image(), min_image_tokens=2)


# ------------------------------------------------------------------------------------------------ features


def encode(model, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the patch features of images of one size, as the encoder of Transformers computes them."""
    tower = model.model.vision_tower
    options = {"interpolate_pos_encoding": True} if hasattr(tower, "embeddings") and _interpolates(tower) else {}
    features = tower(pixels, **options).last_hidden_state
    return features[:, -(pixels.shape[2] // 4) * (pixels.shape[3] // 4) :]


def _interpolates(tower) -> bool:
    return tower.config.model_type in ("siglip_vision_model", "clip_vision_model", "vit")


@pytest.mark.parametrize("tower", TOWERS)
def test_features_are_those_of_the_encoder(tower):
    model = make_native_model(tower)
    processor = make_native_processor(model.config)
    images = [image_of(*size) for size in SIZES]
    inputs = processor(images=images, return_tensors="pt")
    grids = inputs["image_grid_thw"][:, 1:].tolist()
    with torch.no_grad():
        outputs = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        parts = outputs.last_hidden_state.split([rows * columns for rows, columns in grids])
        for number, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
            features = encode(model, pixels_of(image, 4 * rows, 4 * columns))
            own = processor(images=image, return_tensors="pt")
            alone = model.get_image_features(own["pixel_values"], own["image_grid_thw"])
            assert torch.equal(alone.last_hidden_state, features[0])
            # Images of the same size are encoded together, which rounds differently.
            torch.testing.assert_close(parts[number], features[0], rtol=1e-5, atol=1e-5)
            # The connector merges squares of 2 × 2 patches, row by row.
            squares = features.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2).reshape(rows * columns // 4, -1)
            connector = model.model.multi_modal_projector
            tokens = connector.linear_2(connector.act(connector.linear_1(squares)))
            torch.testing.assert_close(alone.pooler_output[0], tokens, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(outputs.pooler_output[number], tokens, rtol=1e-5, atol=1e-5)
    assert [len(tokens) for tokens in outputs.pooler_output] == [rows * columns // 4 for rows, columns in grids]


def test_images_of_one_size_are_encoded_together():
    images = torch.randn(3, 3, 8, 8)
    wide = torch.randn(2, 3, 4, 12)
    patches = torch.cat([to_patches(image[None], 4) for image in (images[0], wide[0], images[1], images[2], wide[1])])
    grids = [(2, 2), (1, 3), (2, 2), (2, 2), (1, 3)]
    seen = []

    def encode_size(pixels):
        seen.append(pixels)
        return to_patches(pixels, 4).view(len(pixels), -1, 48)

    features = features_by_size(patches, grids, make_native_config().vision_config, encode_size)
    assert torch.equal(features, patches)
    assert [pixels.shape for pixels in seen] == [(3, 3, 8, 8), (2, 3, 4, 12)]
    assert torch.equal(seen[0], images)
    assert torch.equal(seen[1], wide)


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov3"])
def test_squares_of_the_size_of_the_tower_are_as_with_a_fixed_size(tower):
    native = make_native_model(tower)
    fixed = make_native_model(tower, image_sizing="fixed")
    pixels = torch.randn(2, 3, 16, 16)
    patches = to_patches(pixels, 4)
    grid = torch.tensor([[1, 4, 4]] * 2)
    with torch.no_grad():
        expected = torch.stack(fixed.get_image_features(pixels).pooler_output)
        for inputs in ((pixels,), (patches, grid)):
            torch.testing.assert_close(torch.stack(native.get_image_features(*inputs).pooler_output), expected)
        wide = native.get_image_features(torch.randn(1, 3, 8, 24)).pooler_output
    assert [tokens.shape for tokens in wide] == [(3, 32)]


@pytest.mark.parametrize("layer", [-2, 0])
def test_layer_of_the_encoder(layer):
    model = make_native_model("clip", vision_feature_layer=layer)
    pixels = torch.randn(1, 3, 8, 24)
    with torch.no_grad():
        outputs = model.model.vision_tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        features = model.get_image_features(to_patches(pixels, 4), torch.tensor([[1, 2, 6]])).last_hidden_state
    assert torch.equal(features, outputs.hidden_states[layer][0, -12:])


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((24, 48), [[1, 2, 6]], "is for 12 patches, but `pixel_values` has 24"),
        ((12, 48), [[1, 3, 4]], r"an image of \[1, 3, 4\], but it must be .* multiples of the 2 patches"),
        ((12, 48), [[1, 4, 3]], r"an image of \[1, 4, 3\]"),
        ((16, 48), [[2, 2, 4]], r"an image of \[2, 2, 4\]"),
        ((12, 48), [[1, 2, 6], [1, 0, 2]], r"an image of \[1, 0, 2\]"),
        ((12, 48), [[1, 2, 6], [1, 2, 0]], r"an image of \[1, 2, 0\]"),
        ((0, 48), [[1, 0, 2]], None),
        ((12, 48), [[2, 6]], r"must have the shape \(images, 3\), .* got \(1, 2\)"),
        ((12, 40), [[1, 2, 6]], r"must have the shape \(patches, 48\), got \(12, 40\)"),
        ((12, 48, 1), [[1, 2, 6]], r"must have the shape \(patches, 48\), got \(12, 48, 1\)"),
        ((12, 48), None, r"`pixel_values` of shape \(12, 48\) need `image_grid_thw`"),
    ],
)
def test_invalid_inputs(shape, grid, message):
    model = make_native_model()
    grid = None if grid is None else torch.tensor(grid)
    if message is None:  # as if there were no images
        assert model.get_image_features(torch.zeros(shape), grid).pooler_output == []
        return
    with pytest.raises(ValueError, match=message):
        model.get_image_features(torch.zeros(shape), grid)


def test_models_of_a_fixed_size_take_no_grids():
    model = make_native_model(image_sizing="fixed")
    inputs = make_native_processor()(text="<image>", images=make_image(), return_tensors="pt")
    with pytest.raises(ValueError, match="takes images of one size, but got `image_grid_thw`"):
        model(**inputs)


def test_features_that_do_not_fit_the_text():
    model, processor = make_native_model(), make_native_processor()
    inputs = processor(text="<image>", images=image_of(20, 50), return_tensors="pt")
    inputs["input_ids"][0, 0] = 5
    inputs.pop("mm_token_type_ids")
    with pytest.raises(ValueError, match=r"tokens: 17, features: 18.* as many tokens as the size of the image needs"):
        model(**inputs)
    # Frames of videos have one size.
    assert model.model._tokens_per_placeholder("video") == "4 tokens per frame"


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("tower", ["siglip", "dinov3"])
def test_batches_of_images_of_different_sizes(tower):
    model = make_native_model(tower)
    processor = make_native_processor(model.config, row_separator=SEPARATOR)
    images = [[image_of(45, 70), image_of(20, 20)], [], [image_of(60, 30)]]
    check_rows_of_batch(model, processor, images)


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_a_training_step(tower):
    model = make_native_model(tower).train()
    processor = make_native_processor(model.config)
    batch = processor(
        text=["<image>a", "b<image>"], images=[image_of(20, 50), image_of(30, 30)], padding=True, return_tensors="pt"
    )
    model(**batch, labels=batch["input_ids"]).loss.backward()
    unused = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    }
    # The hidden states of these towers are read before the pooled output.
    assert {name for name in unused if "post_layernorm" not in name and "pooler" not in name} == set()
    embeddings = model.model.vision_tower.embeddings
    positions = embeddings.position_embedding.weight if tower == "clip" else embeddings.position_embeddings
    assert positions.grad.abs().sum() > 0


def test_half_precision():
    for tower in ("siglip", "dinov3"):
        model = make_native_model(tower)
        inputs = make_native_processor(model.config)(text="<image>", images=image_of(20, 50), return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits
            actual = model.to(torch.bfloat16)(**inputs).logits
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2", "dinov3"])
def test_offloaded_weights(tower):
    """Interpolation reads weights of modules that are not called."""
    model = make_native_model(tower)
    inputs = make_native_processor(model.config)(text="<image>", images=image_of(20, 50), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        for _ in range(2):
            assert torch.equal(model(**inputs).logits, expected)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("has_images", [True, False])
def test_processes_call_the_tower_equally_often(has_images, monkeypatch):
    """Another process has images of 4 sizes: as many calls of the tower, which gather sharded weights."""
    model = make_native_model().train()
    processor = make_native_processor()
    images = [image_of(20, 50), image_of(30, 30), image_of(20, 50)] if has_images else None
    batch = processor(text="<image>" * 3 if has_images else "a", images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits
    calls, told = [], []

    def all_reduce(number, op):
        assert op == torch.distributed.ReduceOp.MAX
        told.append(int(number))
        number.fill_(4)

    model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    monkeypatch.setattr("modeling_sparse_moe_vlm.visual_features.is_one_of_several_processes", lambda: True)
    monkeypatch.setattr("modeling_sparse_moe_vlm.modeling_sparse_moe_vlm.is_one_of_several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    logits = model(**batch).logits
    torch.testing.assert_close(logits, expected)
    blank = (1, 3, 8, 8)
    assert calls == ([(2, 3, 24, 48), (1, 3, 32, 32), blank, blank] if has_images else [blank] * 4)
    assert told == [2 if has_images else 1]
    logits.sum().backward()
    assert model.model.vision_tower.embeddings.position_embedding.weight.grad is not None
    with torch.no_grad():  # no process waits for gradients
        model(**batch)
    model.eval()(**batch)
    assert told == [2 if has_images else 1]


# ------------------------------------------------------------------------------------------------ configurations


def test_choices_of_the_configuration():
    assert SparseMoeVlmConfig().image_sizing == "fixed"
    assert SparseMoeVlmConfig().image_arguments == {"image_seq_length": 49}
    assert make_native_config().image_arguments == {
        "image_seq_length": 4,
        "image_sizing": "native",
        "patch_size": 4,
        "merge_size": 2,
    }
    # The patches per side need not be a multiple of those of a token.
    odd = make_native_config(pixel_shuffle_factor=3)
    assert odd.image_arguments == {"image_seq_length": 1, "image_sizing": "native", "patch_size": 4, "merge_size": 3}
    with pytest.raises(ValueError, match=r"`image_sizing` must be one of .* got 'any'"):
        make_native_config(image_sizing="any")
    with pytest.raises(ValueError, match=r"one token of 5 × 5 patches, but .* splits a square image into 4 × 4"):
        make_native_config(pixel_shuffle_factor=5)
    assert make_native_config(pixel_shuffle_factor=4).image_seq_length == 1


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (
            {"model_type": "aimv2_vision_model"},
            r"\(aimv2_vision_model\) does not take images of any size.*RuntimeError",
        ),
        ({"model_type": "vit_mae"}, r"\(vit_mae\) does not take .* it does not return one feature per patch"),
        ({"model_type": "minicpmv4_7_vision", "insert_layer_id": 0}, r"\(minicpmv4_7_vision\) merges patches in one"),
        ({"model_type": "swin", "embed_dim": 8, "depths": [1], "num_heads": [1]}, r"\(swin\) merges patches"),
    ],
)
def test_towers_that_only_take_squares(vision, message):
    text = TEXT_CONFIG | {"vocab_size": VOCAB_SIZE}
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmConfig(text_config=text, vision_config=TINY_TOWER | vision, image_sizing="native")


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_several_layers(tower):
    """The configurations of some towers name their last layer, but they are tried out with only one layer."""
    fields = TOWERS[tower] | {"num_hidden_layers": 3}
    config = SparseMoeVlmConfig(vision_config=fields, image_sizing="native", text_config=TEXT_CONFIG)
    assert config.vision_config.num_hidden_layers == 3


def test_the_inputs_are_read_from_the_signature():
    assert {tower: native_inputs(make_native_config(tower).vision_config) for tower in TOWERS} == dict.fromkeys(
        TOWERS, "pixel_values"
    )


def test_checking_a_tower_changes_neither_random_numbers_nor_the_configuration():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    config = make_native_config(vision_feature_layer=-1)
    assert torch.equal(torch.rand(3), expected)
    assert config.vision_config.num_hidden_layers == 1
    assert config.vision_config.to_dict() == make_native_config(image_sizing="fixed").vision_config.to_dict()


def test_save_and_load(tmp_path):
    model, processor = make_native_model(), make_native_processor(min_image_tokens=4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_sizing"] == "native"
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    options = {
        "image_sizing": "native",
        "patch_size": 4,
        "merge_size": 2,
        "min_image_tokens": 4,
        "max_image_tokens": 30,
    }
    assert {name: saved[name] for name in options} == options
    reloaded = SparseMoeVlmProcessor.from_pretrained(tmp_path)
    inputs = processor(text="<image>", images=image_of(20, 50), return_tensors="pt")
    again = reloaded(text="<image>", images=image_of(20, 50), return_tensors="pt")
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, model(**inputs).logits)
    # Checkpoints from before there were native sizes.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["image_sizing"]
    assert SparseMoeVlmConfig.from_dict(config).image_sizing == "fixed"
    for name in options:
        del saved[name]
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    assert SparseMoeVlmProcessor.from_pretrained(tmp_path).image_sizing == "fixed"


# Loads the checkpoint in `sys.argv[1]` without the package, and prints what its model generates for a wide image.
WITHOUT_THE_PACKAGE = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_sparse_moe_vlm":
            raise ModuleNotFoundError(f"{name} is not installed")
sys.meta_path.insert(0, Blocker())

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="<image>?", images=Image.open(folder + "/image.png"), return_tensors="pt")
    print(inputs["image_grid_thw"].tolist(), model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist())
"""


@pytest.mark.extensive
@pytest.mark.newest
@pytest.mark.extensive
def test_checkpoints_work_without_the_package(tmp_path):
    lines = []
    for tower in ("siglip", "dinov3"):
        folder = tmp_path / tower
        model = make_native_model(tower)
        processor = make_native_processor(model.config)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        image_of(20, 50).save(folder / "image.png")
        inputs = processor(text="<image>?", images=image_of(20, 50), return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
        lines.append(f"{inputs['image_grid_thw'].tolist()} {generated}")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *(str(tmp_path / tower) for tower in ("siglip", "dinov3"))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == lines
