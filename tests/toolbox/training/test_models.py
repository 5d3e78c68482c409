"""The model that training starts from: its image processor normalises what the processor will show it."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.training import from_scratch


def test_a_new_model_normalises_the_images_at_hand():
    """Also transparent ones, which are white, and grey ones of 16 bits. Channels that hardly vary are not blown up."""
    red = Image.new("RGB", (8, 8), (255, 0, 51))
    images = [red, red, Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("I;16", (8, 8), 51 * 257)]
    columns = {"question": ["what?"] * 4, "answer": ["red"] * 4}
    rows = Dataset.from_dict(columns | {"image": range(4)}).with_transform(
        lambda batch: {key: [images[i] for i in value] if key == "image" else value for key, value in batch.items()}
    )
    _, processor = from_scratch("configuration/models/tiny.json", rows, vocab_size=300)
    by_channel = np.array([[1, 1, 1, 0.2], [0, 0, 1, 0.2], [0.2, 0.2, 1, 0.2]])
    assert processor.image_processor.image_mean == pytest.approx(by_channel.mean(axis=1).tolist(), abs=1e-6)
    assert processor.image_processor.image_std == pytest.approx(by_channel.std(axis=1).tolist(), rel=1e-3)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(pixels.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)

    _, processor = from_scratch("configuration/models/tiny.json", rows.select([0, 1]), vocab_size=300)
    assert processor.image_processor.image_mean == pytest.approx([1, 0, 0.2], abs=1e-6)
    assert processor.image_processor.image_std == pytest.approx([1e-3] * 3)
