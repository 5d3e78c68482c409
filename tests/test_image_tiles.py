"""Images of any shape become tiles and a thumbnail, and the number of their tokens is known beforehand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from modeling_sparse_moe_vlm import SparseMoeVlmProcessor, image_tiles
from tests.support.processors import (
    IMAGE_SEQ_LENGTH,
    assistant,
    make_image,
    make_image_processor,
    make_speaking_model,
    make_tokenizer,
    user,
)
from tests.support.rows_and_batches import check_rows_of_batch

IMAGE = 3
SEPARATOR = "<|im_start|>"
SIZE = {"height": 16, "width": 16}
IMAGE_PROCESSORS = {
    "siglip": lambda: make_image_processor(),
    "vit": lambda: ViTImageProcessorPil(size=SIZE),
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE),
    "dinov2": lambda: BitImageProcessorPil(size={"shortest_edge": 20}, crop_size=SIZE),
}
# Images (height and width) of every orientation, one pixel high, tiny and of ordinary size.
SIZES = [(20, 50), (50, 20), (30, 30), (1, 90), (90, 1), (1, 1), (47, 64)]


def make(image_processor=None, **kwargs) -> SparseMoeVlmProcessor:
    return SparseMoeVlmProcessor(
        image_processor or make_image_processor(), make_tokenizer(), image_seq_length=IMAGE_SEQ_LENGTH, **kwargs
    )


def image_of(height: int, width: int) -> Image.Image:
    return make_image(height * 1000 + width, width, height)


def pixels_of(processor, images, **kwargs) -> torch.Tensor:
    return processor(images=images, return_tensors="pt", **kwargs)["pixel_values"]


def best_grid(height: int, width: int, low: int, high: int, tile: int = 16) -> tuple[int, int]:
    """Returns the rows and columns whose aspect ratio is closest to that of the image, with ties by area."""
    grids = [(n // c, c) for n in range(low, high + 1) for c in range(1, n + 1) if n % c == 0]
    best, difference = (1, 1), float("inf")
    for rows, columns in grids:
        own = abs(width / height - columns / rows)
        if own < difference or (own == difference and 2 * width * height > tile * tile * rows * columns):
            best, difference = (rows, columns), own
    return best


# ------------------------------------------------------------------------------------------------ pixels


def test_tiles_by_row_and_then_the_thumbnail():
    processor = make(SiglipImageProcessorPil(size={"height": 8, "width": 12}), max_tiles=6)
    image = image_of(45, 70)
    assert processor.tile_grid(45, 70) == (2, 3)
    canvas = np.asarray(image.resize((36, 16), Image.Resampling.BICUBIC)) / 255
    expected = [
        canvas[8 * row : 8 * row + 8, 12 * column : 12 * column + 12] for row in range(2) for column in range(3)
    ]
    expected.append(np.asarray(image.resize((12, 8), Image.Resampling.BICUBIC)) / 255)
    expected = torch.tensor(np.stack(expected)).permute(0, 3, 1, 2).float() * 2 - 1
    torch.testing.assert_close(pixels_of(processor, image), expected)


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_every_image_processor(kind):
    """Nothing of an image is cropped, even if the image processor crops the centre of images."""
    image_processor = IMAGE_PROCESSORS[kind]()
    processor = make(image_processor, max_tiles=4)
    resized = image_processor.__class__(size=SIZE, do_center_crop=False)
    image = image_of(60, 30)
    tiles = pixels_of(processor, image)
    canvas = resized(image, size={"height": 32, "width": 16}, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(
        tiles, torch.stack([canvas[:, :16], canvas[:, 16:], resized(image, return_tensors="pt")["pixel_values"][0]])
    )
    image = image_of(18, 17)
    assert torch.equal(pixels_of(processor, image), resized(image, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_one_tile_is_what_the_image_processor_returns(kind):
    image_processor = IMAGE_PROCESSORS[kind]()
    image = image_of(60, 30)
    expected = image_processor(image, return_tensors="pt")["pixel_values"]
    for processor, options in ((make(image_processor), {}), (make(image_processor, max_tiles=4), {"max_tiles": 1})):
        assert torch.equal(pixels_of(processor, image, **options), expected)


def test_padding_keeps_the_aspect_ratio():
    processor = make(do_pad=True)
    for height, width, inner in (
        (20, 50, (6, 16)),
        (50, 30, (16, 10)),
        (30, 50, (10, 16)),
        (1, 90, (1, 16)),
        (90, 1, (16, 1)),
    ):
        image = image_of(height, width)
        expected = torch.zeros(1, 3, 16, 16)
        size = {"height": inner[0], "width": inner[1]}
        expected[..., : inner[0], : inner[1]] = make_image_processor()(image, size=size, return_tensors="pt")[
            "pixel_values"
        ]
        assert torch.equal(pixels_of(processor, image), expected)
        assert torch.equal(pixels_of(make(), image, do_pad=True), expected)
        assert torch.equal(pixels_of(make(make_image_processor(do_pad=True)), image), expected)
        assert torch.equal(pixels_of(processor, image, do_pad=False), pixels_of(make(), image))
        assert torch.equal(pixels_of(processor, image, size=None, do_pad=None), expected)  # as if not given


def test_sizes_of_tiles_for_a_call_and_processors_that_pad():
    processor, image = make(max_tiles=4), image_of(60, 30)
    expected = pixels_of(processor, image)
    assert torch.equal(pixels_of(processor, image, do_center_crop=True, crop_size=SIZE), expected)
    for size in (8, {"height": 8, "width": 8}):
        assert torch.equal(
            pixels_of(processor, image, size=size), pixels_of(make(make_image_processor(8), max_tiles=4), image)
        )
    with pytest.raises(ValueError, match=r"`do_resize=True` and `size=.*`height` and `width`"):
        image_tiles.tile_size_of(make_image_processor(), {"size": {"height": 8}})
    padding = make_image_processor(do_pad=True, pad_size={"height": 20, "width": 20})
    assert torch.equal(
        pixels_of(make(padding, max_tiles=4, do_pad=True), image), pixels_of(processor, image, do_pad=True)
    )


def test_padded_tiles_have_a_padded_thumbnail():
    image = image_of(20, 50)
    tiles = pixels_of(make(max_tiles=6, do_pad=True), image)
    assert torch.equal(tiles[-1:], pixels_of(make(do_pad=True), image))
    canvas = make_image_processor()(image, size={"height": 16, "width": 40}, return_tensors="pt")["pixel_values"][0]
    expected = torch.nn.functional.pad(canvas, (0, 8)).view(3, 16, 3, 16).permute(2, 0, 1, 3)
    assert torch.equal(tiles[:-1], expected)


def test_images_in_any_form_and_type():
    processor = make(max_tiles=6)
    image = image_of(20, 50)
    expected = pixels_of(processor, image)
    array = np.asarray(image)
    for form in (array, array.transpose(2, 0, 1), torch.tensor(array), torch.tensor(array).permute(2, 0, 1)):
        assert torch.equal(pixels_of(processor, form), expected)
    floats = pixels_of(processor, array.astype("float32") / 255, do_rescale=False)
    torch.testing.assert_close(floats, expected, rtol=0, atol=0.05)  # resized as floats
    as_arrays = processor(images=image, return_tensors="np")["pixel_values"]
    as_list = processor(images=image)["pixel_values"]
    assert isinstance(as_arrays, np.ndarray)
    assert isinstance(as_list, list)
    assert np.array_equal(as_arrays, expected.numpy())
    assert np.array_equal(np.stack(as_list), expected.numpy())


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_tokens_of_an_image(separator):
    processor = make(max_tiles=6, row_separator=separator)
    inputs = processor(text="<image>", images=image_of(45, 70), return_tensors="pt")  # 2 rows and 3 columns
    row = [IMAGE] * 3 * IMAGE_SEQ_LENGTH + [1] * (separator is not None)
    expected = row * 2 + [IMAGE] * IMAGE_SEQ_LENGTH
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["mm_token_type_ids"].tolist() == [[int(token == IMAGE) for token in expected]]
    assert sorted(inputs) == ["attention_mask", "input_ids", "mm_token_type_ids", "pixel_values"]
    assert inputs["pixel_values"].shape == (7, 3, 16, 16)
    square = processor(text="<image>", images=image_of(20, 20))
    assert square["input_ids"] == [[IMAGE] * IMAGE_SEQ_LENGTH]  # one tile has neither a separator nor a thumbnail


@pytest.mark.parametrize(("low", "high"), [(1, 9), (3, 12)])
def test_numbers_of_tokens_of_ten_thousand_images(low, high):
    """The numbers that are known beforehand equal those of a definition by brute force, and those that come out."""
    processor = make(min_tiles=low, max_tiles=high, row_separator=SEPARATOR)
    sizes = np.random.default_rng(low).integers(1, 100, (10_000, 2)).tolist()
    known = processor._get_num_multimodal_tokens(image_sizes=sizes)
    grids = [best_grid(*size, low, high) for size in sizes]
    several = [rows * columns > 1 for rows, columns in grids]
    tiles = [rows * columns + more for (rows, columns), more in zip(grids, several, strict=True)]
    assert known["num_image_patches"] == tiles
    separators = [rows * more for (rows, _), more in zip(grids, several, strict=True)]
    assert known["num_image_tokens"] == [4 * n + own for n, own in zip(tiles, separators, strict=True)]
    few = range(0, 10_000, 100)
    inputs = processor(text=["<image>"] * len(few), images=[Image.new("RGB", sizes[i][::-1]) for i in few])
    assert [len(row) for row in inputs["input_ids"]] == [known["num_image_tokens"][i] for i in few]
    assert len(inputs["pixel_values"]) == sum(tiles[i] for i in few)


@pytest.mark.parametrize("options", [{}, {"min_tiles": 3}, {"max_image_tokens": 20}, {"do_pad": True}])
def test_numbers_of_tokens_known_beforehand(options):
    stored, given = make(max_tiles=8, row_separator=SEPARATOR, **options), make(row_separator=SEPARATOR)
    inputs = stored(text=["<image>"] * len(SIZES), images=[image_of(*size) for size in SIZES])
    tokens = [len(row) for row in inputs["input_ids"]]
    options = options | {"max_tiles": 8}
    for processor, kwargs in ((stored, {}), (given, options), (given, {"images_kwargs": options})):
        known = processor._get_num_multimodal_tokens(image_sizes=SIZES, **kwargs)
        assert known["num_image_tokens"] == tokens
        assert [n * IMAGE_SEQ_LENGTH for n in known["num_image_patches"]] == [
            row.count(IMAGE) for row in inputs["input_ids"]
        ]
        separate = [processor(text="<image>", images=image_of(*size), **kwargs)["input_ids"][0] for size in SIZES]
        assert separate == inputs["input_ids"]


def test_most_tokens_of_an_image():
    processor = make(max_tiles=8, row_separator=SEPARATOR)
    # A column of 8 tiles has 9 tiles with the thumbnail and 8 separators: 9 · 4 + 8 = 44 tokens.
    expected = {44: 8, 43: 7, 39: 7, 38: 6, 14: 2, 13: 1, 4: 1}
    assert {most: processor.tile_grid(90, 1, max_image_tokens=most)[0] for most in expected} == expected
    assert processor.tile_grid(90, 1) == (8, 1)
    assert make(max_tiles=8, max_image_tokens=12).tile_grid(90, 1) == (2, 1)  # 3 tiles without separators


def test_fewest_tiles():
    processor = make(min_tiles=4, max_tiles=6)
    assert processor.tile_grid(20, 20) == (2, 2)
    assert processor.tile_grid(90, 30) == (4, 1) == best_grid(90, 30, 4, 6)
    assert processor.tile_grid(90, 30, min_tiles=1) == (3, 1)
    assert processor.tile_grid(90, 30, max_tiles=3) == (3, 1)  # the call has fewer tiles than `min_tiles`
    assert processor.tile_grid(20, 20, max_tiles=3) == (3, 1)
    assert processor.tile_grid(20, 20, max_tiles=1) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tiles": 0}, "`max_tiles` must be an integer of at least 1, got 0"),
        ({"max_tiles": 1001}, "`max_tiles` is 1001, which is not plausible: at most 1000 is allowed"),
        ({"max_tiles": True}, "`max_tiles` must be an integer of at least 1, got True"),
        ({"min_tiles": 0}, "`min_tiles` must be an integer of at least 1, got 0"),
        ({"min_tiles": 3, "max_tiles": 2}, r"`min_tiles` \(3\) must not be larger than `max_tiles` \(2\)"),
        ({"max_image_tokens": 3}, "`max_image_tokens` is 3, but one tile already has 4 tokens"),
        ({"max_image_tokens": 0}, "`max_image_tokens` must be an integer of at least 1, got 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    if not any(value is True for value in options.values()):  # Transformers checks the types of arguments
        with pytest.raises(ValueError, match=message):
            make()(text="<image>", images=make_image(), **options)


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"at least 4 tiles .* has 20 tokens, more than `max_image_tokens` .19.: "):
        make(min_tiles=4, max_tiles=6, max_image_tokens=19)(images=image_of(20, 20))
    assert make(min_tiles=4, max_tiles=6, max_image_tokens=20).tile_grid(20, 20) == (2, 2)
    with pytest.raises(ValueError, match=r"`do_resize=False` and `size=.*use `max_tiles=1`"):
        make(make_image_processor(do_resize=False), max_tiles=2)
    with pytest.raises(ValueError, match=r"`do_resize=True` and `size=.*16.*`height` and `width`"):
        make(SiglipImageProcessorPil(size={"shortest_edge": 16}), do_pad=True)
    with pytest.raises(ValueError, match="`do_pad` must be `True` or `False`, got 'yes'"):
        make(do_pad="yes")


def test_sizes_without_pixels():
    for processor in (make(), make(max_tiles=4)):
        for size in ((0, 5), (5, 0), (-1, 5)):
            with pytest.raises(ValueError, match=rf"an image of {size[0]} × {size[1]} pixels has no pixels"):
                processor._get_num_multimodal_tokens(image_sizes=[size])
        assert processor.tile_grid(1, 1) == (1, 1)
        assert processor.token_grid(1, 5) == (2, 2)


def test_grids_with_too_many_tokens_are_not_tried(monkeypatch):
    tried = []

    def canvas(size, tile_size, low, high):
        tried.append(high)
        return get_optimal_tiled_canvas(size, tile_size, low, high)

    monkeypatch.setattr(image_tiles, "get_optimal_tiled_canvas", canvas)
    # Five tiles in a row fit 20 tokens, but not their thumbnail.
    assert make(max_tiles=1000).tile_grid(10, 90, max_image_tokens=20) == (1, 4)
    assert tried == [5, 4]
    assert make(max_tiles=1000, min_tiles=3).tile_grid(10, 90, max_image_tokens=16) == (1, 3)
    assert tried[2:] == [4, 3]


def test_separators_that_are_not_tokens():
    with pytest.raises(ValueError, match=r"`row_separator` must be a token .* got '<row>'.*add_special_tokens"):
        make(row_separator="<row>")
    with pytest.raises(ValueError, match=r"`row_separator` must be .* other than the image token, got '<image>'"):
        make(row_separator="<image>")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<row>"])
    processor = SparseMoeVlmProcessor(
        make_image_processor(), tokenizer, image_seq_length=1, max_tiles=2, row_separator="<row>"
    )
    row = tokenizer.convert_tokens_to_ids("<row>")
    ids = processor(text="a<image>", images=image_of(60, 30))["input_ids"][0]
    assert ids[-5:] == [IMAGE, row, IMAGE, row, IMAGE]
    assert tokenizer.added_tokens_decoder[row].special
    typed = processor.apply_chat_template([user("<row>")], tokenize=True, return_dict=True)["input_ids"][0]
    assert row not in typed  # what users type stays text


# ------------------------------------------------------------------------------------------------ checkpoints, models


def test_options_are_stored_in_the_checkpoint(tmp_path):
    options = {"min_tiles": 2, "max_tiles": 5, "max_image_tokens": 26, "do_pad": True, "row_separator": SEPARATOR}
    make(**options).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert {name: saved[name] for name in options} == options
    reloaded = SparseMoeVlmProcessor.from_pretrained(tmp_path)
    for name, value in options.items():
        assert getattr(reloaded, name) == value
    assert SparseMoeVlmProcessor.from_pretrained(tmp_path, max_tiles=3).tile_grid(90, 1) == (3, 1)
    # Checkpoints from before there were tiles.
    old = {name: value for name, value in saved.items() if name not in options}
    (tmp_path / "processor_config.json").write_text(json.dumps(old))
    image = image_of(20, 50)
    assert torch.equal(pixels_of(SparseMoeVlmProcessor.from_pretrained(tmp_path), image), pixels_of(make(), image))


def test_options_in_conversations():
    processor = make()
    conversation = [user(image_of(45, 70), "What?"), assistant("A cat")]
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"max_tiles": 6}}
    inputs = processor.apply_chat_template(conversation, **kwargs)
    assert (inputs["input_ids"] == IMAGE).sum() == 7 * IMAGE_SEQ_LENGTH
    assert torch.equal(inputs["pixel_values"], pixels_of(make(max_tiles=6), image_of(45, 70)))


def test_the_model_reads_tiles_as_images_in_the_order_of_their_tokens():
    model, processor = make_speaking_model(), make(max_tiles=6)
    image = image_of(45, 70)
    inputs = processor(text="a<image>b", images=image, return_tensors="pt")
    tiles = image.resize((48, 32), Image.Resampling.BICUBIC)
    tiles = [tiles.crop((x, y, x + 16, y + 16)) for y in (0, 16) for x in (0, 16, 32)] + [image]
    as_images = make()(text=f"a{'<image>' * 7}b", images=tiles, return_tensors="pt")
    assert as_images.keys() == inputs.keys()
    for name in inputs:
        assert torch.equal(inputs[name], as_images[name])
    shuffled = inputs["pixel_values"].flip(0)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert not torch.allclose(logits, model(**inputs | {"pixel_values": shuffled}).logits)


def test_batches_of_images_of_different_sizes():
    model, processor = make_speaking_model(), make(max_tiles=6, row_separator=SEPARATOR)
    images = [[image_of(45, 70), image_of(20, 20)], [], [image_of(60, 30)]]
    batch = check_rows_of_batch(model, processor, images)
    assert batch["pixel_values"].shape == (7 + 1 + 3, 3, 16, 16)


def test_what_the_processor_uses_of_the_library():
    assert get_optimal_tiled_canvas((30, 90), (16, 16), 1, 6) == (3, 1)  # columns, rows
    assert get_optimal_tiled_canvas((90, 30), (16, 16), 4, 6) == (1, 4)
    assert get_optimal_tiled_canvas((33, 33), (16, 16), 1, 4) == (2, 2)
    assert get_optimal_tiled_canvas((22, 22), (16, 16), 1, 4) == (1, 1)
    assert get_optimal_tiled_canvas((23, 23), (16, 16), 1, 4) == (2, 2)
