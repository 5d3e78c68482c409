"""Rows with images as people have them: the same pixels in each form, also cut into tiles."""

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator, load_rows
from tests.support.processors import make_image, make_processor
from tests.toolbox.data.data_files import write_lines

IMAGE = make_image(width=60, height=20)


def exif(path) -> Image.Image:
    """Stored sideways, with the orientation that an image viewer turns upright."""
    orientation = Image.Exif()
    orientation[0x0112] = 6
    IMAGE.transpose(Image.Transpose.ROTATE_90).save(path, exif=orientation)
    return IMAGE


def palette(path) -> Image.Image:
    image = IMAGE.convert("P")
    image.save(path)
    return image.convert("RGB")


def transparent(path) -> Image.Image:
    image = IMAGE.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(IMAGE.size))
    image.save(path)
    white = Image.new("RGBA", IMAGE.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def sixteen_bits(path) -> Image.Image:
    grey = IMAGE.convert("L")
    Image.fromarray(np.asarray(grey).astype("uint16") * 257).save(path)
    return grey.convert("RGB")


def one_pixel_high(path) -> Image.Image:
    image = IMAGE.resize((60, 1))
    image.save(path)
    return image


def animated(path) -> Image.Image:
    IMAGE.save(path, save_all=True, append_images=[Image.new("RGB", IMAGE.size)])
    return IMAGE


@pytest.mark.parametrize("options", [{}, {"max_tiles": 6}, {"max_tiles": 6, "do_pad": True}], ids=str)
@pytest.mark.parametrize("write", [exif, palette, transparent, sixteen_bits, one_pixel_high, animated])
def test_every_form_has_the_pixels_that_a_person_sees(write, options, tmp_path):
    seen = write(tmp_path / "a.png")
    processor = make_processor(**options)
    expected = processor(text="<image>", images=seen, return_tensors="pt")
    row = {"question": "q", "answer": "a", "image": "a.png"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    column = Dataset.from_list([row | {"image": str(tmp_path / "a.png")}]).cast_column("image", datasets.Image())
    content = [{"type": "image", "image": Image.open(tmp_path / "a.png")}]
    opened = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    for rows in (load_rows(path), load_rows(path, streaming=True), load_rows(column), [opened]):
        batch = VisionLanguageCollator(processor)(list(rows))
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert (batch["mm_token_type_ids"] == 1).sum() == (expected["mm_token_type_ids"] == 1).sum()
    counted = processor._get_num_multimodal_tokens(image_sizes=[seen.size[::-1]])
    assert counted.num_image_patches == [len(expected["pixel_values"])]
