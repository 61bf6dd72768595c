"""Quantised files: what is stored is what is read, and what the kernels multiply."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from cpmcu import Engine, cpu_library, gguf_codes, layout
from cpmcu.codes import Codes, nearest
from cpmcu.cpu_weights import KINDS, Layouts, pack
from cpmcu.loader import Source
from cpmcu.quantise import quantise
from cpmcu.spec_gguf import pairs
from cpmcu.stored import Part, Stored
from cpmcu.tensors import Tensors

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
native = pytest.mark.skipif(cpu_library.kernels()[0] is None, reason="no kernels")


def random_codes(rows, cols, bits, group=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (rows, cols), generator=generator, dtype=torch.int8)
    scales = torch.randn(rows, cols // group, generator=generator).half()
    return Codes(codes, scales, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_hold_every_code(bits):
    matrix = random_codes(7, 96, bits)
    stored = layout.to_bytes(matrix)
    assert stored.shape == (7, 48 if bits == 4 else 96)
    assert torch.equal(layout.from_bytes(stored), matrix.codes)
    if bits == 4:  # byte j: column 2 j low, 2 j + 1 high
        assert int(stored[2, 5]) == int(matrix.codes[2, 10]) + 8 + 16 * (matrix.codes[2, 11] + 8)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_ggml_blocks_are_those_of_ggml(kind):
    """Its own bytes are read to the numbers its dequantiser gives, and written back unchanged."""
    quant, bits = GGMLQuantizationType[kind], gguf_codes.KINDS[kind]
    raw = quantize(np.random.default_rng(0).normal(size=(5, 160)).astype(np.float32), quant)
    matrix = gguf_codes.from_blocks(raw, bits)
    assert np.array_equal(matrix.dequantise().numpy(), dequantize(raw, quant))
    assert np.array_equal(gguf_codes.to_blocks(matrix), raw)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_any_group_goes_into_blocks_unrounded(kind, group):
    quant, bits = GGMLQuantizationType[kind], gguf_codes.KINDS[kind]
    matrix = random_codes(5, 256, bits, group)
    held = dequantize(gguf_codes.to_blocks(matrix), quant)
    assert np.array_equal(held, matrix.dequantise().numpy())


def panels(codes):
    """The layout of csrc/args.h in plain operations: data, scales."""
    (rows, cols), count = codes.shape, -(-codes.shape[0] // 16)
    whole = torch.zeros(count * 16, cols, dtype=torch.int16)
    whole[:rows] = codes.codes
    if codes.bits == 8:
        data = (whole + 128).to(torch.uint8).view(count, 16, cols // 4, 4)
    else:
        low, high = (whole + 8).to(torch.uint8).view(count, 16, cols // 8, 2, 4).unbind(3)
        data = low | high << 4
    scales = torch.zeros(count * 16, cols // codes.group, dtype=torch.half)
    scales[:rows] = codes.scales
    return data.transpose(1, 2).flatten(), scales.view(count, 16, -1).transpose(1, 2).flatten()


@native
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_codes_and_rounded_weights_lie_alike(bits, rows):
    """Weights and their codes become the same bytes, those of the layout as it is described."""
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
    kind, pool = {4: cpu_library.INT4, 8: cpu_library.INT8}[bits], cpu_library.Pool(1)
    codes = nearest(weight, bits)
    data, scales = panels(codes)
    for made in (pack(weight, kind, pool), pack(codes, kind, pool)):
        assert torch.equal(torch.from_numpy(made.data), data)
        # as numbers: rows that fill the last panel have scales 0 or -0
        assert torch.equal(torch.from_numpy(made.scales.view(np.float16)), scales)


@native
@pytest.mark.parametrize("group", [64, 128])
def test_large_groups_keep_their_scales(group):
    codes = random_codes(21, 256, 4, group)
    made = pack(codes, cpu_library.INT4, cpu_library.Pool(2))
    data, scales = panels(codes)
    assert torch.equal(torch.from_numpy(made.data), data) and made.struct.group == group
    assert torch.equal(torch.from_numpy(made.scales.view(np.float16)), scales)


def rounding_inputs(group):
    """The linear layer as the kernels have it: inputs in 8 bits from the least to the largest,
    `group` columns to a scale.
    """

    def linear(x, weight, bias=None):
        groups = x.unflatten(-1, (-1, group))
        high, low = groups.amax(-1, keepdim=True), (-groups).amax(-1, keepdim=True)
        step = (high.relu() + low.relu()) / 254
        rounded = torch.where(step == 0, 0.0, (groups / step).round() * step).flatten(-2)
        return plain_linear(rounded, weight, bias)

    plain_linear = F.linear
    return linear


def agree(file, group, monkeypatch):
    """The kernels on stored codes, and the reference on expanded weights with rounded inputs."""
    ours = Engine.from_pretrained(file, dtype="float32", backend="cpu")
    plain = Engine.from_pretrained(file, dtype="float32", backend="reference")
    assert plain.quant == "float32"
    got, exact = ours.logits(IDS), plain.logits(IDS)
    monkeypatch.setattr(F, "linear", rounding_inputs(group))
    wanted = plain.logits(IDS)
    # 1e-5, but for a rounding that falls the other way here and there.
    assert float((got - wanted).norm()) < 0.6 * float((exact - wanted).norm())
    return ours


@native
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_quantised_folder_runs_as_stored(tiny_folder, tmp_path, monkeypatch, bits, group):
    """Metadata alone chooses the kernels."""
    _, folder = tiny_folder("qwen2", hidden_size=128, intermediate_size=256)
    out = tmp_path / "model"  # nothing in the path says what it is
    quantise(folder, out, method="rtn", bits=bits, group=group)
    assert agree(out, group, monkeypatch).quant == f"int{bits}"
    with Tensors(Source(out)) as stored, Tensors(Source(folder)) as original:
        name = "layers.1.mlp.down_proj.weight"
        wanted = nearest(original.read(name), bits, group, search=bits == 8)
        assert torch.equal(stored.read(name), wanted.dequantise())
        assert torch.equal(original.read("norm.weight"), stored.read("norm.weight"))


@native
@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # rows of q and k are interleaved in llama
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_gguf_file_runs_as_stored(tiny_folder, to_gguf, tmp_path, monkeypatch, arch, kind):
    model, _ = tiny_folder(arch)
    file = to_gguf(model, tmp_path / "m.gguf", arch, kind=GGMLQuantizationType[kind])
    ours = agree(file, 32, monkeypatch)
    assert ours.quant == {"Q4_0": "int4", "Q8_0": "int8"}[kind]
    weights = ours._decoder.weights
    assert weights.layers[0].down.struct.kind == {"Q4_0": 3, "Q8_0": 2}[kind]


@native
def test_rounding_anew_is_asked_for_by_name(tiny_folder, tmp_path):
    _, folder = tiny_folder("llama")
    quantise(folder, tmp_path / "m", method="rtn", bits=4, group=64)
    assert Engine.from_pretrained(tmp_path / "m", quant="int8").quant == "int8"
    assert Engine.from_pretrained(tmp_path / "m", quant="float32").quant == "float32"


def damaged(folder, change):
    """`change(tensors)` on the tensors of the first shard that has codes."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index["model.layers.0.mlp.down_proj.weight.codes"]
    tensors = load_file(shard)
    change(tensors, "model.layers.0.mlp.down_proj.weight")
    save_file(tensors, shard)


def wide(tensors, name):
    tensors[name + ".codes"] = tensors[name + ".codes"].to(torch.int16)


def alone(tensors, name):
    del tensors[name + ".scales"]


def infinite(tensors, name):
    tensors[name + ".scales"][3, 1] = torch.inf


def narrow(tensors, name):
    tensors[name + ".scales"] = tensors[name + ".scales"][:, :3].contiguous()


def transposed(tensors, name):
    for end in (".codes", ".scales"):
        tensors[name + end] = tensors[name + end][:32].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wide, "has codes I16"),
        (alone, "comes without its other part"),
        (infinite, "is not finite"),
        (narrow, "expected U8"),
        (transposed, r"has shape \(32, 128\), expected \(64, 128\)"),
    ],
)
def test_damaged_parts(tiny_folder, tmp_path, change, message):
    _, folder = tiny_folder("llama")
    quantise(folder, tmp_path / "m", method="rtn", bits=4, group=32)
    damaged(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "'version' is 2, this cpmcu reads 1"),
        ("bits", 5, "'bits' must be one of"),
        ("group_size", 48, "'group_size' must be one of"),
        ("quant_method", "awq", "'quant_method' is 'awq'"),
    ],
)
def test_metadata_of_another_kind(tiny_folder, tmp_path, field, value, message):
    _, folder = tiny_folder("llama")
    quantise(folder, tmp_path / "m", method="rtn", bits=4, group=32)
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Source(tmp_path / "m")


@native
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "source", ["float32", "float16", "bfloat16", "nibbles", "int8", "Q4_0", "Q8_0"]
)
@pytest.mark.parametrize("through", ["float32", "bfloat16"])
@pytest.mark.parametrize("sliced", [False, True])
def test_every_source_in_every_layout(source, kind, through, sliced, monkeypatch):
    """Parts read where they lie, in shares of rows that cut panels, equal the matrix in one piece;
    rows of heads are put in order.
    """
    if sliced:
        monkeypatch.setattr(Layouts, "SLICE", 1)  # 16 rows at a time
    pool = cpu_library.Pool(2)
    codes, heads = nearest(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)), 8), 6
    bits = {"nibbles": 4, "Q4_0": 4}.get(source, 8)
    if bits == 4:
        codes = nearest(codes.dequantise(), 4)
    coded = source in ("nibbles", "int8", "Q4_0", "Q8_0")
    values = codes.dequantise()
    if not coded:
        values = values.to(getattr(torch, source)).float()

    def part(rows, number):
        mine, scales, group = codes.rows(rows), None, 32 if coded else 0
        if source in ("Q4_0", "Q8_0"):
            memory = gguf_codes.to_blocks(mine)
        elif coded:
            memory, scales = layout.to_bytes(mine), mine.scales
        else:
            memory = values[rows].to(getattr(torch, source))
        return Part(memory, source, (len(rows), 64), scales, bits, group, number)

    order = torch.arange(48)
    shuffled = torch.from_numpy(pairs(24, heads))  # as llama.cpp has the first 24
    parts = [part(shuffled, heads), part(order[24:29], 0), part(order[29:], 0)]
    whole = Stored(lambda: parts, (48, 64), through)
    made = pack(whole, KINDS[kind], pool)
    plain = pack(values if through == "float32" else values.bfloat16(), KINDS[kind], pool)
    assert np.array_equal(made.data, plain.data)
    if kind in ("int8", "int4"):
        assert np.array_equal(made.scales, plain.scales)
    held = values if through == "float32" else values.bfloat16().float()
    assert np.array_equal(whole.floats(), held.numpy())
    if coded:  # and as they are
        kept = pack(Stored(lambda: parts, (48, 64), through, bits, 32), -1, pool)
        same = pack(codes, -1, pool)
        assert np.array_equal(kept.data, same.data) and np.array_equal(kept.scales, same.scales)
        parts[1].scales = None if parts[1].scales is None else parts[1].scales.clone()
        if parts[1].scales is None:
            parts[1].memory[2, :2] = (0, 124)  # infinity
        else:
            parts[1].scales[2, 1] = torch.inf
        with pytest.raises(ValueError, match="scale of the weights is not finite"):
            pack(whole, KINDS[kind], pool)


@native
@pytest.mark.parametrize("most", [1, 1 << 30])
def test_what_is_done_meanwhile(most, monkeypatch):
    """It is called once, beside the first matrices; its answer and its error come through, and a
    bad scale is that of the part it is in.
    """
    monkeypatch.setattr(Layouts, "MOST", most)
    pool, called = cpu_library.Pool(2), []

    def meanwhile():
        called.append(1)
        return "answer"

    layouts = Layouts(pool, meanwhile)
    codes = [random_codes(48, 64, 8, seed=seed) for seed in range(3)]
    made = [layouts.add(c, -1) for c in codes]
    assert layouts.finish() == "answer" and called == [1]
    for matrix, c in zip(made, codes, strict=True):
        assert np.array_equal(matrix.data, pack(c, -1, pool).data)

    layouts = Layouts(pool, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layouts.add(codes[0], -1)
        layouts.finish()
    layouts.finish()  # nothing is left of it

    closed = cpu_library.Pool(1)
    closed.close()
    layouts = Layouts(closed, meanwhile)
    with pytest.raises(RuntimeError, match="the pool is closed"):  # and not weights of nothing
        layouts.add(codes[0], -1)
        layouts.finish()

    parts = [
        Part(c.codes.numpy(), "int8", c.shape, c.scales.numpy(), 8, 32, fault=f"part {i}")
        for i, c in enumerate(codes)
    ]
    with pytest.raises(ValueError, match="have 144 rows together, expected 96"):
        pack(Stored(lambda: parts, (96, 64), "float32", 8, 32), -1, pool)
    parts[1].scales[40, 1] = np.inf
    with pytest.raises(ValueError, match="part 1"):
        pack(Stored(lambda: parts, (144, 64), "float32", 8, 32), -1, pool)


@native
def test_a_shared_out_record_that_fails_is_named():
    """Others may have run before it; nothing hangs, and the pool goes on."""
    pool = cpu_library.Pool(3)
    bad = cpu_library.LayOutArgs(None, 0, cpu_library.Matrix(None, None, None, 1, 1, 9, 0))
    fine = random_codes(16, 64, 8)
    pack(fine, -1, pool)
    with pytest.raises(cpu_library.OperationError) as caught:
        pool.share_out(cpu_library.Records([("lay_out", bad)] * 40))
    assert caught.value.code == 1 and 0 <= caught.value.index < 40
    assert np.array_equal(pack(fine, -1, pool).data, pack(fine, -1, cpu_library.Pool(1)).data)
