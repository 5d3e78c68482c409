"""Scenes as images with captions."""

import pytest

from modeling_sparse_moe_vlm.toolbox.demo import scene_pairs, scenes
from modeling_sparse_moe_vlm.toolbox.demo.scenes import describe_scene


def test_captions_describe_the_whole_scene():
    dataset = scenes("test", 22, grid=(2, 3), cell_size=8)
    pairs = scene_pairs(dataset, grid=(2, 3))
    assert pairs.num_rows == 22
    for row, pair in zip(dataset, pairs):
        assert pair["caption"] == pair["image_id"] == describe_scene(row["scene"], 3)
        assert pair["image"].tobytes() == row["image"].tobytes()
        assert set(pair) == {"image", "caption", "image_id"}
        if row["kind"] == "caption":
            assert pair["caption"] == row["answer"]
    with pytest.raises(ValueError, match=r"the scenes have 6 cells, but `grid` \(2, 2\) has 4"):
        scene_pairs(dataset)


@pytest.mark.parametrize(
    ("scene", "columns", "text"),
    [
        (["cat", "", "dog", "pig"], 2, "cat and nothing above dog and pig"),
        (["cat", "dog", "pig"], 3, "cat, dog and pig"),
        (["", "cat"], 1, "nothing above cat"),
    ],
)
def test_descriptions(scene, columns, text):
    assert describe_scene(scene, columns) == text
