"""Batches of rows, as data collators of users make them."""

import torch


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads on the right."""
    batch = {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=padding)
        for key, padding in {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}.items()
    }
    for key in ("pixel_values", "image_grid_thw"):
        of_rows = [row[key] for row in rows if key in row]
        batch |= {key: torch.cat(of_rows)} if of_rows else {}
    return batch
