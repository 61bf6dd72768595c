"""Stored keys and values of first tokens: what they are, when they are used, what is refused."""

from __future__ import annotations

import json
import logging
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cpmcu import Engine
from cpmcu.calibration import LayerRun, Windows
from cpmcu.convert import convert
from cpmcu.first_token import FirstToken
from cpmcu.int8_rows import of_floats, to_rows
from cpmcu.loader import Source
from cpmcu.quantise import Options, quantise
from cpmcu.sinks import FILE, IDS, ROWS, Sinks, first_tokens
from cpmcu.tensors import Tensors

BACKENDS = ["cpu", "reference"]
BOS, TEXT = 1, [1, 77, 12, 200, 5, 9, 77, 31]


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """folders(arch) -> (the model, it in 4 bits with sinks, it in 4 bits without)."""
    made = {}

    def make(arch):
        if arch not in made:
            model = tiny_folder(arch)[1]
            out = tmp_path_factory.mktemp(arch)
            for name, sinks in (("with", True), ("without", False)):
                quantise(model, out / name, method="rtn", bits=4, sinks=sinks)
            made[arch] = model, out / "with", out / "without"
        return made[arch]

    return make


def held(engine):
    """Keys and values in the cache, float32 [layers, 2, kv_heads, tokens, head_dim]."""
    rows = [torch.as_tensor(x)[:, :, : len(engine.tokens)] for x in engine._cache.layers]
    return torch.stack(rows).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arch", ["llama", "llama-gqa3", "qwen2", "qwen3", "minicpm4"])
def test_first_token_is_as_in_the_unrounded_model(folders, arch, backend):
    model, stored, plain = folders(arch)
    exact, ours, theirs = (
        Engine.from_pretrained(f, backend=backend, dtype="float32") for f in (model, stored, plain)
    )
    for engine in (exact, ours, theirs):
        engine.feed(TEXT)
    exact, ours, theirs = held(exact), held(ours), held(theirs)
    assert (ours - exact)[..., 0, :].abs().max() < 1e-5
    assert (theirs - exact)[..., 0, :].abs().max() > 1e-2
    # The first layer sees the embedding alone: behind the first token nothing differs there.
    assert torch.equal(ours[0, ..., 1:, :], theirs[0, ..., 1:, :])
    assert (ours - theirs)[1, ..., 1:, :].abs().max() > 1e-4


@pytest.mark.parametrize("options", [
    {"backend": "cpu", "dtype": "float32"}, {"backend": "cpu", "dtype": "bfloat16"},
    {"backend": "cpu", "dtype": "float32", "kv": "int8"},
    {"backend": "reference", "dtype": "float32"}, {"backend": "reference", "dtype": "bfloat16"},
    {"backend": "reference", "dtype": "float32", "kv": "int8"},
])  # fmt: skip
def test_all_ways_to_read_a_sequence_agree(folders, options, tmp_path):
    _, stored, plain = folders("llama-gqa3")
    engine = Engine.from_pretrained(stored, **options)
    every = engine.logits(TEXT)
    near = 1e-5 if options["backend"] == "cpu" or options["dtype"] == "float32" else 0.05
    whole = engine.logits(TEXT)[-1].numpy()
    engine.reset()
    assert np.abs(engine.feed(TEXT) - whole).max() < near
    engine.rollback(1)  # the first token stays
    assert np.abs(engine.feed(TEXT[1:]) - whole).max() < near
    engine.rollback(0)
    single = [engine.feed([token]) for token in TEXT]
    assert np.abs(np.stack(single) - every.numpy()).max() < near
    engine.save(tmp_path / "saved")
    other = engine.session()
    other.restore(tmp_path / "saved")
    assert np.array_equal(other.feed([3]), engine.feed([3]))
    # What the first token itself says comes from the rounded weights, as without sinks.
    without = Engine.from_pretrained(plain, **options)
    assert np.abs(without.logits(TEXT)[0] - every[0]).max() < near
    assert np.abs(without.logits(TEXT)[-1] - every[-1]).max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_that_begins_otherwise_is_as_without(folders, backend):
    _, stored, plain = folders("llama")
    ours, theirs = (
        Engine.from_pretrained(f, backend=backend, dtype="float32") for f in (stored, plain)
    )
    assert torch.equal(ours.logits([9, 1, 1, 4]), theirs.logits([9, 1, 1, 4]))
    ours.reset(), theirs.reset()
    ours.feed([9]), theirs.feed([9])
    assert np.array_equal(ours.feed([1]), theirs.feed([1]))  # BOS, but not at the start


def test_8_bit_rows_of_numpy_are_pytorchs():
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 64)).astype(np.float32)
    x[0, 0, 0] = 0
    assert np.array_equal(of_floats(x), to_rows(torch.from_numpy(x)).numpy())


def test_calibration_reads_first_tokens_exactly(tiny_folder, tmp_path):
    """After a quantised layer they are again what the unrounded layers give."""
    source = Source(tiny_folder("qwen3")[1])
    ids = torch.tensor([[1, *range(20, 35)], [7, *range(40, 55)]])
    with Tensors(source) as tensors:
        _, hidden = FirstToken(tensors).run([1, 3])
        first = torch.stack([hidden[:, 0], torch.full_like(hidden[:, 0], torch.nan)], 1)
        run = LayerRun(source.spec, 0, Windows(ids), tmp_path, tensors.read, first)
        from cpmcu.tensors import read_layer

        def stacked(*names):
            return torch.cat([tensors.read(n).float() for n in names])

        layer = read_layer(source.spec, 0, stacked, stacked)
        layer.down = layer.down * 1.5  # "quantised", badly
        for part in ("qkv", "output", "gate_up", "down"):
            run.inputs(layer, part, lambda x: None)
        run.finish(layer)
        after = LayerRun(source.spec, 1, Windows(ids), tmp_path, tensors.read, first)._x
    assert torch.equal(after[0, 0], hidden[1, 0])
    plain = Engine.from_pretrained(source.path, backend="reference", dtype="float32")
    plain.feed([1])
    assert (hidden[0, 0] - plain._decoder.weights.embedding[1]).abs().max() < 1e-6
    assert after.isfinite().all() and (after[1, 0] - hidden[1, 1]).abs().max() > 1e-3


def test_smollm2_is_nearer_to_itself_with_them(smollm2_folder, smollm2, tmp_path):
    """The real model, whose first token has activations of 25,000 where others have 800."""
    quantise(smollm2_folder, tmp_path / "int4", method="rtn", bits=4)
    ids = smollm2.tokenizer.encode(
        "The library of the old town lies between the river and the market. On weekdays it opens "
        "at nine, and whoever comes early finds the reading room empty.", special=False
    )  # fmt: skip
    ids = [BOS, *ids]
    config = json.loads((tmp_path / "int4/config.json").read_text())
    exact = smollm2.logits(ids).log_softmax(-1)
    divergence = {}
    for name in ("with", "without"):
        if name == "without":
            config["quantization_config"]["sinks"] = False
            (tmp_path / "int4/config.json").write_text(json.dumps(config))
        engine = Engine.from_pretrained(tmp_path / "int4", dtype="float32", max_context=128)
        rows = engine.logits(ids).log_softmax(-1)
        divergence[name] = (exact.exp() * (exact - rows)).sum(-1)[1:].mean().item()
    assert divergence["with"] < 0.9 * divergence["without"], divergence


def test_they_are_of_bos_and_of_the_template(smollm2_folder, tiny_folder, tmp_path):
    assert first_tokens(Source(smollm2_folder)) == [1]
    assert first_tokens(Source(tiny_folder("llama")[1])) == [1]
    folder = tmp_path / "other"
    shutil.copytree(smollm2_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    assert first_tokens(Source(folder)) == [0, 1]


def test_conversion_keeps_them_or_says_that_it_does_not(folders, tmp_path, caplog):
    _, stored, _ = folders("llama")
    convert(stored, tmp_path / "copy")
    assert (tmp_path / "copy" / FILE).read_bytes() == (stored / FILE).read_bytes()
    assert Source(tmp_path / "copy").has_sinks
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "cpmcu"):
        convert(stored, tmp_path / "expanded", "F32")
    assert "left out" in caplog.text
    assert not (tmp_path / "expanded" / FILE).exists()


def test_the_paper_needs_them(tiny_folder, tmp_path):
    """Left out of the Hessian and not stored: possible, for comparison; nothing is written."""
    model = tiny_folder("llama")[1]
    assert quantise(model, tmp_path / "m", method="rtn", bits=8, sinks=False).bytes
    assert not (tmp_path / "m" / FILE).exists() and not Source(tmp_path / "m").has_sinks
    assert Options().sinks


def test_a_damaged_file_is_refused(folders, tmp_path):
    _, stored, _ = folders("llama")

    def fresh(name):
        shutil.copytree(stored, tmp_path / name)
        return tmp_path / name / FILE

    def refused(path, what, error=ValueError):
        with pytest.raises(error, match=what):
            Engine.from_pretrained(path.parent)

    path = fresh("missing")
    path.unlink()
    refused(path, "copy it too", FileNotFoundError)
    path = fresh("cut")
    path.write_bytes(path.read_bytes()[:-5])
    refused(path, "not a valid safetensors file")
    good = load_file(stored / FILE)
    for name, change, what in (
        ("shape", {ROWS: good[ROWS][:, :1]}, r"must be F32 \[1, 2, 2, 2, 16\], got F32"),
        ("dtype", {ROWS: good[ROWS].astype(np.float16)}, "got F16"),
        ("nan", {ROWS: good[ROWS] * np.float32(np.nan)}, "not finite"),
        ("token", {IDS: good[IDS] + 10_000}, "unknown tokens"),
        ("ids", {IDS: good[IDS].astype(np.int32)}, "got I32"),
        ("none", {IDS: None}, "got nothing"),
    ):
        path = fresh(name)
        save_file({k: v for k, v in (good | change).items() if v is not None}, path)
        refused(path, what)
    generator = random.Random(0)
    for number in range(60):  # any byte
        path = fresh(f"byte{number}") if number == 0 else path
        data = bytearray((stored / FILE).read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            Sinks.load(path, Source(stored).spec)
        except ValueError:
            pass
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"]["sinks"] = "yes"
    (path.parent / "config.json").write_text(json.dumps(config))
    refused(path, "'sinks' must be true or false")
