"""Damaged checkpoints are named, and a save that failed half-way is not read as one that went well."""

import errno
import json
import shutil

import pytest
import safetensors.torch

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from tests.support.models import make_model


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path, kept):
    make_model().save_pretrained(tmp_path, max_shard_size="50KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:kept])
    with pytest.raises(OSError, match=f"{second.name} is not whole, it .* bytes.*download the file again"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)


def fail_at(number: int, monkeypatch):
    """Lets the disk be full when that many files have been written."""
    written = []

    def save_file(*args, **kwargs):
        if len(written) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(args)
        return safetensors.torch.save_file(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)


def test_no_checkpoint_of_two_models(tmp_path, monkeypatch):
    make_model(seed=0).save_pretrained(tmp_path, max_shard_size="50KB")
    shutil.copytree(tmp_path, tmp_path / "copy")
    fail_at(2, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        make_model(seed=1).save_pretrained(tmp_path, max_shard_size="50KB")
    with pytest.raises(OSError, match="no file named model"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    # Where nothing has been written yet, the old checkpoint is as it was.
    fail_at(0, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        make_model(seed=1).save_pretrained(tmp_path / "copy", max_shard_size="50KB")
    assert len(json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())["weight_map"]) > 10
    SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "copy")
