"""Batches of rows with images of different sizes: each row must be treated as on its own."""

from typing import Any

import torch

TEXTS = ["one<image>two<image>?", "none", "<image>!"]


def check_rows_of_batch(model: Any, processor: Any, images: list[list[Any]]) -> Any:
    """Compares inputs, logits and generated tokens of `TEXTS` in a batch with those of each text. Returns the batch."""
    batch = processor(text=TEXTS, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    generate = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 2, "do_sample": False}
    together = model.generate(**batch, **generate)[:, -3:]
    for row, (text, own) in enumerate(zip(TEXTS, images, strict=True)):
        single = processor(text=text, images=own or None, return_tensors="pt")
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        with torch.no_grad():
            torch.testing.assert_close(logits[row, -length:], model(**single).logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(**single, **generate)[0, -3:], together[row])
    return batch
