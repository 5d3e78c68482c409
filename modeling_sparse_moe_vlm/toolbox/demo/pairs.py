"""Conversion of the scenes to images with captions, for retrieval."""

from __future__ import annotations

from functools import partial

from datasets import Dataset

from .scenes import describe_scene


def scene_pairs(dataset: Dataset, grid: tuple[int, int] = (2, 2)) -> Dataset:
    """
    Turns scenes into images with captions. Each row is converted when it is read. The caption describes the whole
    scene and does not depend on the question of the row.

    Args:
        dataset (`datasets.Dataset`):
            Dataset that [`~toolbox.demo.scenes`] returns.
        grid (`tuple[int, int]`, *optional*, defaults to `(2, 2)`):
            Number of rows and columns of the scenes.

    Returns:
        `datasets.Dataset`: Rows with the columns `image`, `caption` and `image_id`, in the form that
        [`~toolbox.data.RetrievalCollator`] takes. The `image_id` is the caption, because the caption fits all scenes
        with the same objects in the same places.

    Raises:
        ValueError: If the scenes have another number of cells.
    """
    cells = len(dataset[0]["scene"])
    if cells != grid[0] * grid[1]:
        raise ValueError(f"the scenes have {cells} cells, but `grid` {grid!r} has {grid[0] * grid[1]}.")
    return dataset.select_columns(["image", "scene"]).with_transform(partial(_to_pairs, columns=grid[1]))


def _to_pairs(batch: dict[str, list], columns: int) -> dict[str, list]:
    captions = [describe_scene(scene, columns) for scene in batch["scene"]]
    return {"image": batch["image"], "caption": captions, "image_id": captions}
