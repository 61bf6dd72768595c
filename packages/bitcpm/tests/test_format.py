from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitcpm import PackedTensor, TernaryConfig, load_packed
from bitcpm.format import save_packed
from bitcpm.qat import fake_quantise


@pytest.fixture
def packed(tmp_path):
    w = fake_quantise(torch.randn(6, 70), TernaryConfig(group_size=32)).bfloat16()
    plain = {"norm": torch.randn(70), "ids": torch.arange(3)}
    path = tmp_path / "model.safetensors"
    save_packed(path, {"w": PackedTensor.from_weights(w, 32)}, plain)
    return path, w, plain


def test_round_trip(packed):
    path, w, plain = packed
    tensors = load_packed(path)
    assert set(tensors) == {"w", "norm", "ids"}
    assert torch.equal(tensors["w"], w) and tensors["w"].dtype == torch.bfloat16
    assert torch.equal(tensors["norm"], plain["norm"]) and torch.equal(tensors["ids"], plain["ids"])
    wide = load_packed(path, torch.float32)
    assert torch.equal(wide["w"], w.float())
    assert wide["ids"].dtype == torch.int64


def test_bytes_on_disk_are_the_documented_format(packed):
    # Read with nothing of ours but the documentation.
    path, w, _ = packed
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert list(metadata) == ["bitcpm"]
    entry = {"shape": [6, 70], "dtype": "BF16", "group_size": 32, "codec": "1.6bit"}
    assert json.loads(metadata["bitcpm"]) == {"version": 1, "tensors": {"w": entry}}
    begin, end = header["w.codes"]["data_offsets"]
    codes = torch.frombuffer(
        bytearray(data[8 + length + begin : 8 + length + end]), dtype=torch.uint8
    )
    digits = codes.reshape(6, 14)[:, :, None].int() // torch.tensor([1, 3, 9, 27, 81]) % 3
    assert torch.equal(digits.reshape(6, 70) - 1, w.sign().int())


def rewrite(path, change_entry=None, change_header=None, tensors=None, drop=()):
    """Write the packed file again with something wrong in it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["bitcpm"])
    if change_entry:
        header["tensors"]["w"] |= change_entry
    if change_header is not None:
        header = change_header(header)
    stored = load_file(path) | (tensors or {})
    stored = {k: v for k, v in stored.items() if k not in drop}
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(stored, path, {"bitcpm": text})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": [6, 71]}, r"w.codes must be U8 \[6, 15\].*got U8 \[6, 14\]"),
        ({"shape": [10**12, 10**12]}, "w.codes must be U8"),
        ({"shape": [0, 70]}, "both >= 1"),
        ({"shape": [-6, 70]}, "both >= 1"),
        ({"shape": [6]}, "shape must be two whole numbers"),
        ({"shape": [True, 70]}, "shape must be two whole numbers"),
        ({"shape": "6x70"}, "shape must be two whole numbers"),
        ({"dtype": "F32"}, r"w.scales must be F32 \[6, 3\]"),
        ({"dtype": ["BF16"]}, "dtype must be one of F32, BF16, F16"),
        ({"codec": "2bit"}, r"w.codes must be U8 \[6, 18\]"),
        ({"codec": "zip"}, "codec must be one of"),
        ({"group_size": 64}, r"w.scales must be BF16 \[6, 2\]"),
        ({"group_size": 0}, "group_size must be >= 1, or -1"),
        ({"group_size": "32"}, "group_size must be a whole number"),
        ({"extra": 1}, "the entry must have shape, dtype, group_size, codec"),
    ],
)
def test_lying_entries_are_refused(packed, change, match):
    rewrite(packed[0], change)
    with pytest.raises(ValueError, match=match):
        load_packed(packed[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h | {"version": 2}, "format version 2, this release reads 1"),
        (lambda h: {"version": 1}, "lists no tensors"),
        (lambda h: h | {"tensors": {"w": 3}}, "the entry must have"),
        (lambda h: [h], "format version None"),
        (lambda h: "{", "not valid JSON"),
        (lambda h: "[" * 100_000, "not valid JSON"),
        (lambda h: h | {"tensors": h["tensors"] | {"v": h["tensors"]["w"]}}, "v.codes is missing"),
    ],
)
def test_bad_metadata_is_refused(packed, change, match):
    rewrite(packed[0], change_header=change)
    with pytest.raises(ValueError, match=match):
        load_packed(packed[0])


def test_bad_tensors_are_refused(packed):
    path = packed[0]
    good = path.read_bytes()
    stored = load_file(path)
    for change, match in (
        (dict(drop=("w.scales",)), "w.scales is missing"),
        (dict(tensors={"w": torch.ones(2)}), "w is there twice"),
        (dict(tensors={"w.codes": stored["w.codes"] | 255}), "w: packed codes hold a byte"),
        (dict(tensors={"w.scales": stored["w.scales"] * torch.nan}), "w: scales must be finite"),
        (dict(tensors={"w.codes": stored["w.codes"].int()}), "w.codes must be U8.*got I32"),
    ):
        path.write_bytes(good)
        rewrite(path, **change)
        with pytest.raises(ValueError, match=match):
            load_packed(path)


def test_truncated_and_foreign_files_are_refused(packed, tmp_path):
    path = packed[0]
    good = path.read_bytes()
    for size in (0, 4, 8, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            load_packed(path)
    path.write_bytes(struct.pack("<Q", 2**60) + good[8:])
    with pytest.raises(ValueError, match="is damaged"):
        load_packed(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a packed model: make one with `bitcpm pack`"):
        load_packed(path)
    with pytest.raises(FileNotFoundError, match="expected a model folder"):
        load_packed(tmp_path / "nowhere")


def test_every_flipped_byte_of_the_header_is_survived(packed):
    path, w, _ = packed
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    for position in range(0, 8 + length):
        bad = bytearray(good)
        bad[position] ^= 0x15
        path.write_bytes(bad)
        try:
            load_packed(path)
        except ValueError:
            continue


def test_names_must_not_clash(tmp_path):
    p = PackedTensor.from_weights(torch.ones(2, 16), 16)
    with pytest.raises(ValueError, match=r"has a tensor w\.codes as well"):
        save_packed(tmp_path / "f", {"w": p}, {"w.codes": torch.ones(1)})
    with pytest.raises(ValueError, match="no ternary tensor to pack"):
        save_packed(tmp_path / "f", {}, {"w": torch.ones(1)})
    assert not list(tmp_path.iterdir())
