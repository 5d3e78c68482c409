"""The output folder of an upcycled model: what it can replace, and what is left if writing fails."""

import shutil
from collections import namedtuple

import pytest

from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.output_folder import check_dtype, check_output, whole_folder

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("file", ["config.json", "a.safetensors", "model.safetensors.index.json", "m.bin", "m.gguf"])
def test_a_model_is_replaced_only_on_request(file, tmp_path):
    (tmp_path / file).write_text("")
    with pytest.raises(UpcyclingError, match=rf"already contains a model \({file}\)"):
        check_output(tmp_path)
    check_output(tmp_path, overwrite=True)


def test_folders_without_a_model(tmp_path):
    (tmp_path / "README.md").write_text("")
    check_output(tmp_path)
    check_output(tmp_path / "new" / "folder")


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UpcyclingError, match="file is a file: choose a folder"):
        check_output(tmp_path / "file", overwrite=True)


def test_never_the_dense_model(tmp_path):
    (tmp_path / "dense").mkdir()
    with pytest.raises(UpcyclingError, match="is the folder of the dense model"):
        check_output(tmp_path / "dense" / ".." / "dense", tmp_path / "dense", overwrite=True)
    check_output(tmp_path / "dense", "dense")  # a name on the Hub


@pytest.mark.parametrize("dtype", ["float99", "int8", "float8_e4m3fn", "nn", ""])
def test_dtypes_that_are_not_for_weights(dtype):
    with pytest.raises(UpcyclingError, match=f"got '{dtype}'"):
        check_dtype(dtype)


def test_dtypes_of_weights():
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        check_dtype(dtype)


def test_all_files_appear_at_once(tmp_path):
    with whole_folder(tmp_path / "a" / "b", 3) as stage:
        (stage / "one").write_text("1")
        (stage / "two").write_text("2")
        assert list((tmp_path / "a" / "b").iterdir()) == []
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"one", "two"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def write_and_fail(output, error):
    with whole_folder(output, 3) as stage:
        (stage / "config.json").write_text("new")
        raise error("it failed")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_if_writing_fails(error, tmp_path):
    (tmp_path / "there").mkdir()
    for output in ("a/b/c", "there", "there/new"):
        with pytest.raises(error, match="it failed"):
            write_and_fail(tmp_path / output, error)
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


def test_existing_files_stay_if_writing_fails(tmp_path):
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(OSError, match="it failed"):
        write_and_fail(tmp_path, OSError)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "old")]


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2_000_000_000))
    with whole_folder(tmp_path / "fits", 2_000_000_000):
        pass
    message = "2.0 GB of free space, but the model needs 3.5 GB"
    with pytest.raises(UpcyclingError, match=message), whole_folder(tmp_path / "does not", 3_500_000_000):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]
