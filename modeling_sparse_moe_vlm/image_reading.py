"""Reads images from many sources as RGB PIL images that look the way an image viewer shows them."""

from __future__ import annotations

import base64
import math
import os
import warnings
from io import BytesIO
from typing import Any

from transformers import image_utils
from transformers.utils import is_numpy_array, is_torch_tensor, logging

logger = logging.get_logger(__name__)

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"
# Resizing can produce floats outside the range of an image. They are clipped up to this fraction of the range.
_OVERSHOOT = 0.1
# An image of non-integer floats below this value is probably not in the range [0, 255], in which it would be black.
_DARK = 8
_ORIENTATION = 0x0112  # the EXIF tag


def read_images(images: Any, data_format: str | None = None, do_rescale: bool = True) -> list:
    """
    Reads one or several images the way an image viewer shows them: rotated according to their EXIF orientation, with
    transparent areas on a white background, and with 16-bit and float values scaled to 8 bits.

    Args:
        images (`Any`):
            An image, a list of images, or a list of lists of images. An image is a PIL image, a path, a URL, a base64
            string, the bytes of a file, a dict with `bytes` or `path` (as in an `Image` column of `datasets`), or an
            array or tensor: grey, grey with alpha, RGB or RGBA, with integers (8 or 16 bits), booleans, or floats in
            [0, 1] or [0, 255]. An array with an additional dimension is a batch of images. `None` stands for a missing
            image.
        data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"`, for arrays. Inferred by default.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether the image processor rescales values from [0, 255]. If not, float arrays keep their values.

    Returns:
        `list`: The images and lists of images as RGB PIL images, or as arrays of shape `(H, W, 3)` for float arrays
        that keep their values. `None` is kept.

    Raises:
        ValueError: If an image cannot be read, has no pixels, is absurdly large, has values outside every valid range,
            or has an ambiguous shape. The message names the image.
    """
    reader = _Reader(data_format, do_rescale)
    if not isinstance(images, (list, tuple)):
        return reader.read(images, "images")
    rows: list = []
    for i, row in enumerate(images):
        name = f"images[{i}]"
        if isinstance(row, (list, tuple)):
            rows.append([image for j, item in enumerate(row) for image in reader.read(item, f"{name}[{j}]")])
        else:
            rows += reader.read(row, name)
    return rows


class _Reader:
    """Reads images with the options of one call of [`read_images`]."""

    def __init__(self, data_format: str | None, do_rescale: bool):
        self.data_format = None if data_format is None else str(getattr(data_format, "value", data_format))
        self.do_rescale = do_rescale

    def read(self, source: Any, name: str) -> list:
        """Returns the images of one entry: a single image, or the images of a batch."""
        if source is None:
            return [None]
        if is_torch_tensor(source):
            tensor = source.detach().cpu()
            return self._read_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), name, True)
        if is_numpy_array(source):
            return self._read_array(source, name, False)
        pil = image_utils.PIL.Image
        if not isinstance(source, (pil.Image, str, bytes, os.PathLike, dict)):
            raise ValueError(
                f"{name} is not an image: pass a PIL image, an array, a path, a URL or the bytes of a file, not "
                f"{type(source)}."
            )
        try:
            with warnings.catch_warnings():
                # Pillow only warns about an image between one and two times its size limit.
                warnings.simplefilter("error", pil.DecompressionBombWarning)
                return [_to_rgb(_open(source, name), name)]
        except (pil.DecompressionBombWarning, pil.DecompressionBombError) as error:
            raise ValueError(f"{name} is absurdly large: {error}") from error
        except _ImageError:
            raise
        except Exception as error:  # the decoders of Pillow can raise any type of error
            raise ValueError(f"{name} cannot be read as an image: {error}") from error

    def _read_array(self, array: Any, name: str, is_tensor: bool) -> list:
        if array.ndim not in (2, 3, 4):
            raise ValueError(
                f"{name} is not an image: its shape is {array.shape}, but images have 2 or 3 dimensions, and batches "
                "of images have 4."
            )
        if 0 in array.shape:
            raise ValueError(f"{name} is empty: its shape is {array.shape}, so it has no pixels.")
        if array.ndim == 2:
            array = array[..., None]
        elif self._channels_first(array.shape[-3:], name, is_tensor):
            array = array.swapaxes(-3, -2).swapaxes(-2, -1)
        batch = array if array.ndim == 4 else array[None]
        if array.dtype.kind == "f" and not self.do_rescale:
            return [_as_floats(image, name) for image in batch]
        # The range of values is determined for the whole batch, because one of its images may be black.
        return [_on_white(_from_bytes(image)) for image in _as_bytes(batch, name)]

    def _channels_first(self, shape: tuple[int, ...], name: str, is_tensor: bool) -> bool:
        """
        Returns whether the first dimension of an image is its channels, according to its shape. If both the first and
        the last dimension can be channels, the usual format of tensors or arrays decides.
        """
        may_be_first, may_be_last = shape[0] in range(1, 5), shape[2] in range(1, 5)
        if self.data_format is not None:
            if self.data_format not in (CHANNELS_FIRST, CHANNELS_LAST):
                raise ValueError(
                    f"`input_data_format` must be {CHANNELS_FIRST!r} or {CHANNELS_LAST!r}, got {self.data_format!r}."
                )
            is_first = self.data_format == CHANNELS_FIRST
            if not (may_be_first if is_first else may_be_last):
                raise ValueError(
                    f"{name} has shape {shape}, but `input_data_format={self.data_format!r}` needs 1 to 4 channels in "
                    f"the {'first' if is_first else 'last'} dimension."
                )
            return is_first
        if not may_be_first and not may_be_last:
            raise ValueError(
                f"{name} is not an image: neither the first nor the last dimension of its shape {shape} has 1 to 4 "
                "channels."
            )
        if may_be_first and may_be_last:
            # A size of 3 or 4 is nearly always the channels. A size of 1 or 2 can also be that of a narrow image.
            if shape[2 if is_tensor else 0] >= 3:
                raise ValueError(
                    f"{name} has the ambiguous shape {shape}: pass `input_data_format='{CHANNELS_FIRST}'` or "
                    f"`'{CHANNELS_LAST}'`, or a PIL image."
                )
            return is_tensor
        return may_be_first


class _ImageError(ValueError):
    """An error whose message already names the image."""


def _open(source: Any, name: str) -> Any:
    """Opens an image that is not an array, without decoding it."""
    pil = image_utils.PIL.Image
    if isinstance(source, pil.Image):
        return source
    if isinstance(source, dict):
        data, path = source.get("bytes"), source.get("path")
        if data is None and path is None:
            raise _ImageError(f"{name} is not an image: a dict needs `bytes` or `path`, but this has {list(source)}.")
        return _open(path if data is None else data, name)
    if isinstance(source, bytes):
        return pil.open(BytesIO(source))
    if isinstance(source, os.PathLike) or os.path.isfile(source):
        return pil.open(source)
    if source.startswith(("http://", "https://")):
        response = image_utils.httpx.get(source, follow_redirects=True)
        response.raise_for_status()
        return pil.open(BytesIO(response.content))
    try:
        encoded = source.partition(",")[2] if source.startswith("data:") else source
        return pil.open(BytesIO(base64.b64decode(encoded)))
    except Exception as error:
        shown = source if len(source) <= 100 else f"{source[:100]}…"
        raise ValueError(f"{shown!r} is neither a file, nor a URL, nor the base64 text of an image") from error


def _to_rgb(image: Any, name: str) -> Any:
    """Decodes a PIL image, rotates it upright and converts it to RGB. Returns the same object if nothing changes."""
    pil = image_utils.PIL
    if 0 in image.size:
        raise _ImageError(f"{name} is empty: its size is {image.size}, so it has no pixels.")
    limit = pil.Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise pil.Image.DecompressionBombError(
            f"{image.width} × {image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS ({limit})"
        )
    # Photos of phones (MPO files) contain a second image that is not meant to be shown.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        logger.warning(f"{name} has {image.n_frames} frames: only frame {image.tell()} is read.")
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = pil.ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_grey(image, name)
    return _on_white(image)


def _to_grey(image: Any, name: str) -> Any:
    """Converts an image with 16-bit, 32-bit or float values to 8 bits. The conversion of Pillow only clips values."""
    transparent = image.info.get("transparency")
    values = image_utils.to_numpy_array(image)
    grey = _from_bytes(_as_bytes(values, name, is_sixteen_bit=image.mode.startswith("I;16"))[..., None])
    if transparent is None:
        return grey
    alpha = (255 * (values != transparent)).astype("uint8")
    return image_utils.PIL.Image.merge("LA", [grey, image_utils.PIL.Image.fromarray(alpha)])


def _on_white(image: Any) -> Any:
    """Converts an image to RGB with transparent areas on white, as the image processors of Transformers do."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        # Pillow can only convert premultiplied grey to RGBA through this mode.
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = image_utils.PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = image_utils.PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_bytes(array: Any) -> Any:
    """Returns the PIL image (grey, grey with alpha, RGB or RGBA) of a uint8 array of shape `(H, W, 1 to 4)`."""
    return image_utils.PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _as_floats(array: Any, name: str) -> Any:
    """Returns a float array as an array of shape `(H, W, 3)` with the same values."""
    if array.shape[-1] in (2, 4):
        raise ValueError(
            f"{name} has an alpha channel, which is not supported for floats with `do_rescale=False`: drop it."
        )
    _value_range(array, name)
    return array.repeat(3, axis=-1) if array.shape[-1] == 1 else array


def _value_range(array: Any, name: str) -> tuple[float, float]:
    """Returns the lowest and the highest value. Raises an error if they are not finite."""
    lowest, highest = float(array.min()), float(array.max())
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise _ImageError(f"{name} contains NaN or infinite values: replace them.")
    return lowest, highest


def _as_bytes(array: Any, name: str, is_sixteen_bit: bool = False) -> Any:
    """Converts the values of an image to 8 bits, depending on their type and range."""
    if array.dtype == "uint8":
        return array
    if array.dtype.kind == "b":
        return array.astype("uint8") * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} is not an image: its values are of type {array.dtype}, but must be integers, floats or booleans."
        )
    lowest, highest = _value_range(array, name)
    ranges = f"{name} has values from {lowest:g} to {highest:g}, "
    if array.dtype.kind == "f":
        scale = 1 if highest <= 1 + _OVERSHOOT else 255
        is_dark = scale == 255 and highest < _DARK and (lowest < 0 or bool((array % 1).any()))
        if is_dark or lowest < -_OVERSHOOT * scale or highest > (1 + _OVERSHOOT) * scale:
            raise _ImageError(f"{ranges}but floats must be in [0, 1] or [0, 255]: scale them.")
        return (array.astype("float64") * (255 / scale)).clip(0, 255).round().astype("uint8")
    if lowest < 0 or highest > 65535:
        raise _ImageError(f"{ranges}but integers must be in [0, 255], or in [0, 65535] for 16 bits: scale them.")
    if array.dtype.itemsize == 2 and array.dtype.kind == "u" and not is_sixteen_bit and 0 < highest <= 255:
        raise _ImageError(
            f"{ranges}in 16 bits, so it is black or has 8 bits: pass 8-bit values as uint8, or 16-bit values as a PIL "
            "image."
        )
    if is_sixteen_bit or highest > 255:
        return (array.astype("float64") / 257).round().astype("uint8")
    return array.astype("uint8")
