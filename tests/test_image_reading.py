"""The model reads images of every form and mode as a person sees them, or an error names the image."""

import base64
import io
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import image_utils

from modeling_sparse_moe_vlm import SparseMoeVlmProcessor
from modeling_sparse_moe_vlm.image_reading import read_images
from tests.support.processors import make_image, make_processor, user

pytestmark = pytest.mark.newest

CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
COLOURS = np.random.RandomState(0).randint(0, 256, (6, 7, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
ALPHA = COLOURS[..., 1]


@pytest.fixture(scope="module")
def processor() -> SparseMoeVlmProcessor:
    return make_processor()


def read(image, **kwargs) -> np.ndarray:
    """Reads an image and returns it as an array."""
    (result,) = read_images([image], **kwargs)
    assert result.mode == "RGB"
    return np.asarray(result)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None] / 255
    return colours * weight + 255 * (1 - weight)


def as_file(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def turned(orientation: int) -> tuple[bytes, np.ndarray]:
    """Returns a file with an EXIF orientation, and the image as a person sees it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = as_file(Image.fromarray(COLOURS), exif=exif)
    return data, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


# ------------------------------------------------------------------------------------------------ ordinary images


def test_an_rgb_image_is_not_converted(processor):
    image = make_image()
    assert read_images(image)[0] is image
    expected = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (image, array, tensor, array.transpose(2, 0, 1), tensor.permute(1, 2, 0), torch.tensor(tensor)):
        assert torch.equal(processor(text="<image>", images=form, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_images_from_files_are_the_same_in_every_form(processor, tmp_path, orientation):
    data, expected = turned(orientation)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    column = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None}]})
    forms = {
        "opened": Image.open(path),
        "opened and loaded": Image.open(io.BytesIO(data)).copy(),
        "path": str(path),
        "Path": path,
        "bytes": data,
        "base64": encoded,
        "data URL": f"data:image/png;base64,{encoded}",
        "dict": {"bytes": None, "path": str(path)},
        "column of structs": column[0]["image"],
        "column of images": column.cast_column("image", datasets.Image())[0]["image"],
    }
    reference = processor(text="<image>", images=Image.fromarray(expected), return_tensors="pt")["pixel_values"]
    for name, form in forms.items():
        assert np.array_equal(read(form), expected), name
        message = {"role": "user", "content": [{"type": "image", "image": form}]}
        assert torch.equal(processor.apply_chat_template([message], **CHAT)["pixel_values"], reference), name
    for url in (str(path), encoded, forms["data URL"]):
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        assert torch.equal(processor.apply_chat_template([message], **CHAT)["pixel_values"], reference)


@pytest.fixture
def server():
    """Serves one file at `/image.png`."""

    class Handler(BaseHTTPRequestHandler):
        data = b""

        def do_GET(self):
            self.send_response(200 if self.path == "/image.png" else 404)
            self.end_headers()
            self.wfile.write(self.data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", Handler
    server.shutdown()
    server.server_close()


def test_images_from_urls(server):
    """The whole file is read, with its orientation, transparency and depth."""
    url, handler = server
    handler.data, expected = turned(6)
    assert np.array_equal(read(f"{url}/image.png"), expected)
    handler.data = as_file(Image.fromarray(GREY.astype(np.uint16) * 257))
    assert np.array_equal(read(f"{url}/image.png"), GREY[..., None].repeat(3, axis=-1))
    with pytest.raises(ValueError, match=r"images\[0\] cannot be read as an image: .*404"):
        read(f"{url}/missing.png")


def test_the_given_image_is_not_changed():
    image = Image.open(io.BytesIO(turned(6)[0]))
    read(image)
    assert image.size == (7, 6)
    assert image.getexif()[0x0112] == 6
    array = COLOURS / 255
    before = array.copy()
    read(array)
    assert np.array_equal(array, before)


# ------------------------------------------------------------------------------------------------ modes and types


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_modes_without_transparency(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    assert np.array_equal(read(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_on_white(mode):
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    image = image.convert("LA").convert(mode) if mode in ("PA", "La") else image.convert(mode)
    straight = {"RGBa": "RGBA", "La": "LA"}.get(mode, mode)
    rgba = np.asarray(image.convert(straight).convert("RGBA"))
    expected = on_white(rgba[..., :3], rgba[..., 3])
    assert np.abs(read(image) - expected).max() <= 1
    assert (read(Image.new("RGBA", (2, 2), (9, 8, 7, 0))) == 255).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "I;16"])
def test_a_transparent_colour_is_white(mode, tmp_path):
    colours = {"P": 3, "L": 3, "RGB": (3, 4, 5), "I;16": 3 * 257}
    image = Image.new(mode, (4, 5), colours[mode])
    if mode == "P":
        image.putpalette([i for colour in range(256) for i in (colour, colour, colour)])
    image.putpixel((1, 2), 200 * 257 if mode == "I;16" else (200, 200, 200) if mode == "RGB" else 200)
    (tmp_path / "image.png").write_bytes(as_file(image, transparency=colours[mode]))
    expected = np.full((5, 4, 3), 255, np.uint8)
    expected[2, 1] = 200
    assert np.array_equal(read(tmp_path / "image.png"), expected)
    assert np.array_equal(read(Image.open(tmp_path / "image.png")), expected)


def test_arrays_of_every_number_of_channels():
    grey = GREY[..., None].repeat(3, axis=-1)
    assert np.array_equal(read(GREY), grey)
    for channels, expected in (
        ([GREY], grey),
        ([GREY, ALPHA], on_white(grey, ALPHA)),
        ([*np.moveaxis(COLOURS, -1, 0)], COLOURS),
        ([*np.moveaxis(COLOURS, -1, 0), ALPHA], on_white(COLOURS, ALPHA)),
    ):
        last, first = np.stack(channels, -1), np.stack(channels)
        for form in (last, first, torch.from_numpy(last), torch.from_numpy(first)):
            assert np.abs(read(form) - expected).max() <= (1 if len(channels) in (2, 4) else 0)


FORMS = {
    "float64": COLOURS / 255,
    "float32": (COLOURS / 255).astype(np.float32),
    "float16": (COLOURS / 255).astype(np.float16),
    "float, to 255": COLOURS.astype(np.float32),
    "float, overshooting": (COLOURS / 255 - 0.5) * 1.0001 + 0.5,
    "float, to 255, overshooting": (COLOURS - 127.5) * 1.0001 + 127.5,
    "16 bits": COLOURS.astype(np.uint16) * 257,
    "16 bits in 32": COLOURS.astype(np.int32) * 257,
    "8 bits in 64": COLOURS.astype(np.int64),
    "tensor": torch.from_numpy(COLOURS / 255).permute(2, 0, 1),
    "tensor of half": (torch.from_numpy(COLOURS) / 255).permute(2, 0, 1).to(torch.float16),
    "tensor with gradient": (torch.from_numpy(COLOURS) / 255).permute(2, 0, 1).requires_grad_(),
    "tensor of integers": torch.from_numpy(COLOURS).permute(2, 0, 1).long(),
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_every_type_and_range(form):
    assert np.array_equal(read(FORMS[form]), COLOURS)


def test_tensors_in_bfloat16():
    tensor = (torch.from_numpy(COLOURS) / 255).permute(2, 0, 1).bfloat16()
    assert np.abs(read(tensor).astype(int) - COLOURS).max() <= 1


@pytest.mark.parametrize(("value", "expected"), [(0.5, 128), (1.0, 255), (0.0, 0), (1.05, 255), (-0.05, 0)])
def test_values_of_floats(value, expected):
    assert (read(np.full((5, 6, 3), value)) == expected).all()


@pytest.mark.parametrize(("value", "expected"), [(100.4, 100), (8.0, 8), (2.0, 2), (8.6, 9), (270.0, 255), (-20.0, 0)])
def test_values_of_floats_to_255(value, expected):
    array = np.full((5, 6, 3), value)
    array[0, 0] = 200 if value < 0 else value
    assert (read(array)[1:] == expected).all()


@pytest.mark.parametrize(("value", "expected"), [(128, 0), (129, 1), (65535, 255), (32896, 128), (256, 1), (300, 1)])
def test_values_of_16_bits(value, expected):
    for image in (Image.new("I;16", (5, 6), value), Image.new("I;16B", (5, 6), value)):
        assert (read(image) == expected).all()
    if value > 255:
        assert (read(np.full((5, 6), value, np.uint16)) == expected).all()
        assert (read(Image.new("I", (5, 6), value)) == expected).all()


def test_grey_images_of_more_than_8_bits(tmp_path):
    grey = GREY[..., None].repeat(3, axis=-1)
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    sixteen.save(tmp_path / "16.png")
    floats = Image.fromarray((GREY / 255).astype(np.float32))
    floats.save(tmp_path / "F.tiff")
    for form in (
        sixteen,
        tmp_path / "16.png",
        Image.open(tmp_path / "16.png"),
        Image.fromarray(GREY.astype(np.int32) * 257),
        Image.fromarray(GREY.astype(np.int32)),
        floats,
        tmp_path / "F.tiff",
        Image.fromarray(GREY.astype(np.float32)),
        GREY.astype(np.uint16) * 257,
    ):
        assert np.array_equal(read(form), grey)


def test_booleans_are_black_and_white():
    expected = (np.where(GREY > 127, 255, 0)[..., None] * np.ones(3)).astype(np.uint8)
    for form in (GREY > 127, torch.from_numpy(GREY > 127), Image.fromarray(GREY > 127)):
        assert np.array_equal(read(form), expected)


def test_floats_that_the_image_processor_does_not_rescale_keep_their_values(processor):
    options = {"do_rescale": False, "do_resize": False, "return_tensors": "pt"}
    floats = (COLOURS / 255).astype(np.float32)
    expected = processor(text="<image>", images=COLOURS, do_resize=False, return_tensors="pt")["pixel_values"]
    for form in (floats, torch.from_numpy(floats).permute(2, 0, 1), floats[:1]):
        actual = processor(text="<image>", images=form, **options)["pixel_values"]
        torch.testing.assert_close(actual, expected[:, :, : len(form) if form.shape[-1] == 3 else 6])
    options = {"images_kwargs": {"do_rescale": False, "do_resize": False}, "return_tensors": "pt"}
    torch.testing.assert_close(processor(text="<image>", images=floats, **options)["pixel_values"], expected)
    grey = processor(text="<image>", images=floats[..., :1], **options)["pixel_values"]
    assert torch.equal(grey, grey[:, :1].expand(-1, 3, -1, -1))
    alone = processor(images=[floats, COLOURS], **options)["pixel_values"]
    assert alone.shape[0] == 2
    torch.testing.assert_close(alone[0], expected[0])
    # The processor can also be created with this option.
    other = make_processor()
    other.image_processor.do_rescale = False
    torch.testing.assert_close(
        other(text="<image>", images=floats, do_resize=False, return_tensors="pt")["pixel_values"], expected
    )
    with pytest.raises(ValueError, match=r"images\[0\] has an alpha channel"):
        read_images([np.dstack([floats, floats[..., :1]])], do_rescale=False)
    with pytest.raises(ValueError, match=r"images\[0\] contains NaN"):
        read_images([floats * np.nan], do_rescale=False)


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(("height", "width"), [(1, 9), (9, 1), (1, 1), (2, 9), (9, 2), (9, 3), (9, 4), (1, 3), (2, 2)])
def test_narrow_images(processor, height, width):
    colours = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    expected = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
    forms = [colours, colours[..., :1].repeat(3, axis=-1)]
    if width < 3:
        forms.append(torch.from_numpy(colours).permute(2, 0, 1))
    if height > 2:
        forms.append(colours[..., 0])
    for form in forms:
        pixels = processor(text="<image>", images=form, return_tensors="pt")["pixel_values"]
        if form is not forms[0] and isinstance(form, np.ndarray):
            grey = Image.fromarray(colours[..., 0])
            assert torch.equal(pixels, processor(text="<image>", images=grey, return_tensors="pt")["pixel_values"])
        else:
            assert torch.equal(pixels, expected)


@pytest.mark.parametrize("shape", [(3, 9, 3), (4, 9, 3), (3, 9, 4), (3, 9, 1), (4, 9, 2)])
def test_ambiguous_shapes_of_arrays(shape):
    array = np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"images\[0\] has the ambiguous shape \(.*input_data_format='channels_first'"):
        read(array)
    if shape[2] == 3:
        assert np.array_equal(read(array, data_format="channels_last"), array)
    if shape[0] == 3:
        assert np.array_equal(read(array, data_format="channels_first"), array.transpose(1, 2, 0))
    if shape[2] >= 3:
        with pytest.raises(ValueError, match=r"images\[0\] has the ambiguous shape"):
            read(torch.from_numpy(array))
    else:  # three or four channels come first in tensors
        assert read(torch.from_numpy(array)).shape == (9, shape[2], 3)


def test_one_row_of_a_tensor_is_ambiguous_and_one_of_an_array_is_not():
    row = COLOURS[:1]
    assert np.array_equal(read(row), row)
    with pytest.raises(ValueError, match="ambiguous"):
        read(torch.from_numpy(row))
    grey = row[..., :1]
    assert read(grey).shape == (1, 7, 3)
    assert read(torch.from_numpy(grey)).shape == (7, 1, 3)


def test_the_order_of_channels_is_passed_to_the_image_processor(processor):
    array = np.random.RandomState(0).randint(0, 256, (3, 9, 3), dtype=np.uint8)
    expected = processor(text="<image>", images=Image.fromarray(array), return_tensors="pt")["pixel_values"]
    for options in ({"input_data_format": "channels_last"}, {"images_kwargs": {"input_data_format": "channels_last"}}):
        pixels = processor(text="<image>", images=array, return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(pixels, expected)
    pixels = processor(
        text="<image>", images=array.transpose(2, 0, 1), return_tensors="pt", input_data_format="channels_first"
    )["pixel_values"]
    assert torch.equal(pixels, expected)
    with pytest.raises(ValueError, match=r"`input_data_format` must be 'channels_first' or 'channels_last', got 'x'"):
        read(array, data_format="x")
    with pytest.raises(
        ValueError, match=r"\(9, 9, 3\), but `input_data_format='channels_first'` needs 1 to 4 channels in the first"
    ):
        read(np.zeros((9, 9, 3)), data_format="channels_first")


def test_batches_of_images_in_one_array(processor):
    images = [make_image(i) for i in range(3)]
    batch = np.stack(images)
    expected = processor(text="<image>" * 3, images=images, return_tensors="pt")["pixel_values"]
    for given in (batch, [batch], [batch[:2], batch[2]], [[batch]], torch.from_numpy(batch).permute(0, 3, 1, 2)):
        assert torch.equal(processor(text="<image>" * 3, images=given, return_tensors="pt")["pixel_values"], expected)
    # One range for all: an image whose values are at most 1 is black here, not white.
    dark = np.concatenate([batch, np.ones_like(batch[:1])]).astype(np.float32)
    assert (np.asarray(read_images(dark)[3]) == 1).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros(5), r"is not an image: its shape is \(5,\)"),
        (np.zeros((2, 1, 3, 9, 9)), r"is not an image: its shape is \(2, 1, 3, 9, 9\)"),
        (
            np.zeros((9, 8, 7)),
            r"is not an image: neither the first nor the last dimension of its shape \(9, 8, 7\) has 1 to 4",
        ),
        (np.zeros((5, 9, 9)), "neither the first nor the last dimension"),
        (np.zeros((9, 9, 5)), "neither the first nor the last dimension"),
        (np.zeros((0, 4, 3)), r"is empty: its shape is \(0, 4, 3\)"),
        (torch.zeros(3, 5, 0), "is empty"),
        (Image.new("RGB", (0, 5)), r"is empty: its size is \(0, 5\)"),
        (np.array([["a", "b"]]), "is not an image: its values are of type <U1, but must be integers"),
        (np.zeros((2, 2), complex), "is not an image: its values are of type complex128, but"),
        (np.full((9, 9, 3), np.nan), "contains NaN or infinite values"),
        (np.array([[0.5, np.inf]]), "contains NaN or infinite values"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "contains NaN or infinite values"),
        (
            COLOURS / 127.5 - 1,
            r"has values from -0.960784 to 0.968627, but floats must be in \[0, 1\] or \[0, 255\]: scale them",
        ),
        ((COLOURS / 255 - 0.45) / 0.22, "but floats must be in"),
        (COLOURS / 255 + 0.2, "but floats must be in"),
        (COLOURS / 36, "but floats must be in"),
        (COLOURS / 255 - 0.2, "but floats must be in"),
        (COLOURS.astype(float) * 2, "but floats must be in"),
        (COLOURS.astype(float) - 40, "but floats must be in"),
        (np.array([[-1.0, 2.0]]), "but floats must be in"),
        (COLOURS.astype(int) - 300, r"has values from .*but integers must be in \[0, 255\]"),
        (COLOURS.astype(int) * 65536, "but integers must be in"),
        (COLOURS.astype(np.int8), "but integers must be in"),
        (COLOURS.astype(np.uint16), "in 16 bits, so it is black or has 8 bits"),
        (7, r"is not an image: .* not <class 'int'>"),
        ({"a": 1}, r"is not an image: a dict needs `bytes` or `path`, but this has \['a'\]"),
        ({"bytes": None, "path": None}, "a dict needs `bytes` or `path`"),
        ([], "is not an image"),
        ([[1, 2], [3, 4]], "is not an image"),
        (object(), "is not an image"),
    ],
)
def test_errors_name_inputs_that_are_not_images(processor, image, message):
    with pytest.raises(ValueError, match=rf"^images\[1\]\[2\] .*{message}"):
        processor(text=["a", "<image>" * 3], images=[[], [COLOURS, make_image(), image]])
    if not isinstance(image, list):
        with pytest.raises(ValueError, match=rf"^images .*{message}"):
            processor(text="<image>", images=image)
        with pytest.raises(ValueError, match=rf"^images\[1\] .*{message}"):
            processor(text="<image><image>", images=[make_image(), image])


@pytest.mark.parametrize("case", ["truncated", "text", "empty", "missing", "directory", "nonsense", "base64"])
def test_unreadable_images(processor, tmp_path, case):
    path = tmp_path / "image.png"
    if case == "truncated":
        make_image(width=200, height=200).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif case == "text":
        path.write_text("this is not an image")
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "directory":
        path.mkdir()
    source = {"nonsense": "no image", "base64": base64.b64encode(b"no image" * 999).decode()}.get(case, str(path))
    good = make_image()
    with pytest.raises(ValueError, match=r"^images\[1\] cannot be read as an image: ") as error:
        processor(text="<image><image>", images=[good, source])
    assert len(str(error.value)) < 300
    if case in ("missing", "directory", "nonsense", "base64"):
        assert "is neither a file, nor a URL, nor the base64 text of an image" in str(error.value)
    with pytest.raises(ValueError, match=r"^images\[1\]\[0\] cannot be read as an image"):
        processor.apply_chat_template(
            [[user(good)], [{"role": "user", "content": [{"type": "image", "url": source}]}]], **CHAT
        )
    if case in ("truncated", "text", "empty"):
        with pytest.raises(ValueError, match=r"^images\[0\] cannot be read as an image"):
            processor(text="<image>", images=[path.read_bytes()])
    if case == "truncated":  # Pillow opens it, and reads it later
        with pytest.raises(ValueError, match=r"^images\[0\] cannot be read as an image"):
            processor(text="<image>", images=[Image.open(path)])
    if case == "missing":
        with pytest.raises(ValueError, match=r"^images\[0\] cannot be read as an image: .*No such file"):
            processor(text="<image>", images=[path])


@pytest.mark.parametrize("times_the_limit", [1.5, 4])
def test_decompression_bombs(processor, tmp_path, monkeypatch, times_the_limit):
    """They are refused because of their size. The file is truncated, so decoding it first would give another error."""
    path, cut = tmp_path / "bomb.png", tmp_path / "cut.png"
    Image.new("1", (int(100 * times_the_limit), 100)).save(path)
    cut.write_bytes(path.read_bytes()[:50])
    opened = Image.open(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    for bomb in (str(path), str(cut), path.read_bytes(), opened):
        with pytest.raises(ValueError, match=r"images\[0\] is absurdly large: .*pixels"):
            processor(text="<image>", images=[bomb])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for image in (str(path), opened):
        assert processor(text="<image>", images=[image])["pixel_values"][0].shape == (3, 16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * times_the_limit) * 100)
    assert processor(text="<image>", images=[opened])["pixel_values"][0].shape == (3, 16, 16)


# ------------------------------------------------------------------------------------------------ animations


@pytest.fixture
def warnings_of_the_reader():
    """Records the warnings of the module. Records of the loggers of Transformers do not reach pytest."""
    logger = logging.getLogger("modeling_sparse_moe_vlm.image_reading")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read_with_a_warning(warnings_of_the_reader, tmp_path, format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    path = tmp_path / "image"
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(path, format, save_all=True, append_images=frames[1:], **options)
    assert (read(path) == (255, 0, 0)).all()
    assert warnings_of_the_reader == ["images[0] has 3 frames: only frame 0 is read."]
    # For an opened image, the caller chooses the frame.
    image = Image.open(path)
    image.seek(1)
    assert (read(image) == (0, 0, 255)).all()
    assert warnings_of_the_reader[1:] == ["images[0] has 3 frames: only frame 1 is read."]


def test_still_images_and_photos_of_phones_give_no_warning(warnings_of_the_reader, tmp_path):
    image = make_image()
    image.save(tmp_path / "photo", "MPO", save_all=True, append_images=[make_image(1)])
    assert Image.open(tmp_path / "photo").n_frames == 2
    read(tmp_path / "photo")
    read(as_file(image, "GIF"))
    read(image)
    assert warnings_of_the_reader == []


# ------------------------------------------------------------------------------------------------ rows


def test_none_means_no_image(processor):
    a, b = make_image(0), make_image(1)
    texts = ["<image>", "none", "<image>!"]
    expected = processor(text=texts, images=[a, b], padding=True, return_tensors="pt")
    for images in ([a, None, b], [[a], None, [b]], [[a], [None], b], [[None, a], [], [b, None]]):
        actual = processor(text=texts, images=images, padding=True, return_tensors="pt")
        for key in expected:
            assert torch.equal(actual[key], expected[key])
    for images in ([None], [[None]], [], [[]]):
        assert processor(text="none", images=images).data == processor(text="none").data


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<image>", "a"], [None, 1], r"text\[0\] has 1 tokens, but 0 images"),
        (["a", "<image>"], [None, None], r"text\[1\] has 1 tokens, but 0 images"),
        (["<image>"], [None, 1], r"`images` is for 2 texts, but `text` has 1"),
        (["<image>"], [[1, 1, None]], r"text\[0\] has 1 tokens, but 2 images"),
        ("<image>", [None], r"text\[0\] has 1 tokens, but 0 images"),
        ("<image>", [], "there are 1 tokens, but 0 images"),
    ],
)
def test_rows_with_none_that_do_not_fit(processor, texts, images, message):
    images = [[make_image() if x else x for x in row] if isinstance(row, list) else row for row in images]
    images = [make_image() if row == 1 else row for row in images]
    with pytest.raises(ValueError, match=message):
        processor(text=texts, images=images)


def test_none_needs_texts(processor):
    with pytest.raises(
        ValueError, match="`images` contains None, which stands for a text without images, but there is no `text`"
    ):
        processor(images=[make_image(), None])


def test_names_that_the_reader_imports_from_transformers():
    """Files that are saved with checkpoints must not import Pillow or the download client themselves."""
    assert callable(image_utils.httpx.get)
    assert image_utils.PIL.ImageOps.exif_transpose is ImageOps.exif_transpose
