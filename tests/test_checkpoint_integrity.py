"""Errors about damaged checkpoints name the damaged file."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration, SparseMoeVlmModel
from modeling_sparse_moe_vlm.checkpoint_integrity import check_names, check_weights, read_header
from tests.support.models import make_config, make_model

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path, kept):
    make_model().save_pretrained(tmp_path, max_shard_size="50KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:kept])
    with pytest.raises(OSError, match=f"{second.name} is incomplete, it .* bytes.*download the file again"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)


@pytest.fixture
def small_file(tmp_path) -> Path:
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int16), "c": torch.ones(1)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_flipped_bit_anywhere_in_a_header(small_file):
    """The error names the file, or the file is read exactly as the library reads it."""
    whole = small_file.read_bytes()
    header_length = int.from_bytes(whole[:8], "little")
    read, messages = 0, []
    for place in range(8 * (8 + header_length)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        small_file.write_bytes(damaged)
        try:
            check_weights([small_file])
        except OSError as error:
            messages.append(str(error))
            continue
        header, start = read_header(small_file)
        tensors = safetensors.torch.load_file(small_file)
        assert header.keys() == tensors.keys()
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            assert bytes(damaged[begin:end]) == tensors[name].numpy().tobytes()
            assert entry["shape"] == list(tensors[name].shape)
        read += 1
    assert read > 20
    assert len(messages) > 700
    for message in messages:
        assert message.startswith(f"{small_file} is "), message
        assert message.endswith("copy or download the file again, or save the model again."), message


def with_header(header: str | bytes, num_bytes: int, length: int | None = None) -> bytes:
    encoded = header.encode() if isinstance(header, str) else header
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + bytes(num_bytes)


def entry(dtype="F32", shape="[2, 3]", offsets="[0, 24]") -> str:
    return f'{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}'


FIRST = '"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}'


def two(offsets: str) -> str:
    return f'{{{FIRST}, "b": {{"dtype": "U8", "shape": [4], "data_offsets": {offsets}}}}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is incomplete, it has 0 bytes and no complete header"),
        (b"1234567", "is incomplete, it has 7 bytes and no complete header"),
        (with_header("{}", 3, length=6), "is incomplete, it has 13 bytes and no complete header"),
        (with_header("{}", 0, length=2**64 - 1), "is incomplete, it has 10 bytes and no complete header"),
        (with_header("", 0), "is damaged, its header cannot be read (Expecting value"),
        (with_header("[1]", 0), "it is not a table of tensors"),
        (with_header(b'{"\xff": 1}', 0), "is damaged, its header cannot be read ('utf-8' codec"),
        (with_header("[" * 100_000, 0), "is damaged, its header cannot be read (maximum recursion"),
        (with_header('{"__metadata__": {"format": 1}}', 0), "its metadata are not strings"),
        (with_header('{"__metadata__": ["pt"]}', 0), "its metadata are not strings"),
        (with_header('{"a": [0, 24]}', 24), "it does not describe the tensor 'a'"),
        (with_header('{"a": {"dtype": "F32", "shape": [6]}}', 24), "it does not describe the tensor 'a'"),
        (with_header(entry(dtype="F33"), 24), "the tensor 'a' has the unknown dtype 'F33'"),
        (with_header(entry(shape="[2, -3]"), 24), "the tensor 'a' has the shape [2, -3] and the offsets [0, 24]"),
        (with_header(entry(shape="[2, 3.0]"), 24), "the tensor 'a' has the shape [2, 3.0]"),
        (with_header(entry(shape="6"), 24), "the tensor 'a' has the shape 6"),
        (with_header(entry(offsets="[0]"), 24), "and the offsets [0]"),
        (with_header(entry(offsets="[0, true]"), 24), "and the offsets [0, True]"),
        (
            with_header(entry(offsets="[24, 0]"), 24),
            "the tensor 'a' of shape [2, 3] and dtype F32 does not fit in bytes",
        ),
        (with_header(entry(shape="[2, 2]"), 24), "does not fit in bytes [0, 24]"),
        (with_header(entry(dtype="F64"), 24), "of shape [2, 3] and dtype F64 does not fit in bytes [0, 24]"),
        (with_header(entry(offsets="[4, 28]"), 28), "the tensor 'a' begins at byte 4 instead of 0"),
        (with_header(two("[3, 7]"), 8), "the tensor 'b' begins at byte 3 instead of 4"),
        (with_header(two("[5, 9]"), 9), "the tensor 'b' begins at byte 5 instead of 4"),
        (with_header(entry(), 23), "is incomplete, it has 96 of 97 bytes"),
        (with_header(entry(), 25), "is damaged, it has 98 bytes where its header lists 97"),
    ],
)
def test_damaged_headers(tmp_path, content, message):
    """Errors name the file and its checkpoint. The errors of the library name neither."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"again\.$") as error:
        check_weights([path])
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    make_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"again\.$") as error:
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("bits", [4, 8, 16, 32, 64])
def test_headers_that_are_whole(tmp_path, bits):
    dtypes = {4: ["F4"], 8: ["U8", "F8_E4M3", "BOOL"], 16: ["BF16", "I16"], 32: ["F32", "U32"], 64: ["I64", "C64"]}[
        bits
    ]
    num_bytes = 6 * bits // 8
    entries = {
        name: {"dtype": name, "shape": [2, 3], "data_offsets": [num_bytes * i, num_bytes * (i + 1)]}
        for i, name in enumerate(dtypes)
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(json.dumps({"__metadata__": {"format": "pt"}} | entries), num_bytes * len(dtypes)))
    check_weights([path])
    assert read_header(path) == (entries, path.stat().st_size - num_bytes * len(dtypes))
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(dtypes)


@pytest.mark.parametrize("model_class", [SparseMoeVlmForConditionalGeneration, SparseMoeVlmModel])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "experts.1.up_proj.weight", "layers.1.input_layernorm.weight"])
def test_a_flipped_bit_in_a_name(tmp_path, name, model_class):
    """The file is consistent, so the library would only warn, and initialise the tensor that it cannot find."""
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    place = whole.index(name.encode())
    damaged = chr(ord(name[0]) ^ 1) + name[1:]
    path.write_bytes(whole.replace(name.encode(), damaged.encode(), 1))
    assert path.read_bytes()[place : place + len(name)] == damaged.encode()
    with pytest.raises(OSError, match=f"^{path} is damaged, it has the tensor '.*{damaged}' instead of '.*{name}'"):
        model_class.from_pretrained(tmp_path)


def test_names_that_differ_for_other_reasons(tmp_path):
    path = tmp_path / "model.safetensors"

    def save(*names: str) -> None:
        safetensors.torch.save_file({name: torch.ones(1) for name in names}, path)

    for found, expected in (
        (["layers.2.bias"], ["layers.2.bias"]),
        (["layers.2.bias"], ["layers.2.bias", "layers.3.bias"]),
        (["layers.2.bias", "layers.3.bias"], ["layers.2.bias"]),
        (["layers.2.bias"], ["layers.1.bias", "layers.22.bias", "other"]),
        (["layers.2.bias", "lm_head"], ["layers.3.bias"]),  # another number of layers, perhaps
    ):
        save(*found)
        check_names([path], expected)
    for found, expected in (
        (["layers.2.bias"], ["layers.3.bias"]),
        (["lm_head", "layers.2.bias"], ["layers.3.bias", "lm_head"]),
        (["layers.2.bias", "lm_head"], ["other", "layers.r.bias"]),
        (["layers.2.bias", "lm_head"], ["layers.2.biar"]),
    ):
        save(*found)
        with pytest.raises(OSError, match=f"^{path} is damaged, it has the tensor 'layers.2.bias' instead of 'layers."):
            check_names([path], expected)


def test_shards_that_are_missing_or_lack_a_tensor(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="50KB")
    shards, index = sorted(tmp_path.glob("*.safetensors")), tmp_path / "model.safetensors.index.json"
    listed = index.read_text()
    for shard in (shards[0], shards[-1]):
        shard.rename(tmp_path / "kept")
        with pytest.raises(OSError, match=f"^{shard} is missing: copy or download the file again"):
            SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
        (tmp_path / "kept").rename(shard)

    name = next(name for name, file in json.loads(listed)["weight_map"].items() if file == shards[1].name)
    tensors = safetensors.torch.load_file(shards[1])
    del tensors[name]
    kept = shards[1].read_bytes()
    safetensors.torch.save_file(tensors, shards[1], metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"^{shards[1]} lacks the tensor '{name}', which the index lists"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    shards[1].write_bytes(kept)

    for damaged in ("", listed[:-30], "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(damaged)
        with pytest.raises(OSError, match=f"^{index} is damaged, it is not the index of a checkpoint .*again.$"):
            SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    index.write_text(listed)
    SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)


def test_damage_in_a_subfolder(tmp_path):
    make_model().save_pretrained(tmp_path / "inner")
    path = tmp_path / "inner" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3])
    (tmp_path / "model.safetensors").write_bytes(b"of something else")
    with pytest.raises(OSError, match=f"^{path} is incomplete"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, subfolder="inner")


def test_other_errors_are_not_changed(tmp_path):
    """Files are checked only after errors about their contents. Any other error is raised as it is."""
    make_model().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no_such_argument"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, no_such_argument=1)
    with pytest.raises(OSError, match="no file named"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, variant="none")


def test_shapes_that_do_not_fit_are_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    message = r"mismatch: 'lm_head.weight' has the shape \[99, 32\] in .* but \[98, 32\] .* \(1 more tensors differ"
    with pytest.raises(RuntimeError, match=message):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, config=make_config(vocab_size=98))
