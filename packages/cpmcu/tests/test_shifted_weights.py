"""GGUF's 4-bit types with shifted weights, Q4_1 and Q4_K, as the CPU's kernels hold them,
and files of several types, against the gguf package's dequantiser.
"""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import testbed
from cpmcu import Engine, cpu_library, plan, tokenizer
from cpmcu.convert import convert
from cpmcu.cpu_weights import KINDS, pack
from cpmcu.ggml_types import KINDS as GGML
from cpmcu.gguf_file import GGUFFile
from cpmcu.loader import Source
from cpmcu.spec_gguf import pairs
from cpmcu.stored import Part, Stored

pytestmark = pytest.mark.skipif(cpu_library.kernels()[0] is None, reason="no kernels")
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
ROW_BYTES = {"Q4_0": 18 / 32, "Q4_1": 20 / 32, "Q4_K": 144 / 256, "Q6_K": 210 / 256}
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}  # bytes of a block's halves


def blocks(kind, rows, cols, seed=0):
    """Random bytes, with scales of a real model's size."""
    rng = np.random.default_rng(seed)
    size = {"Q4_K": 144, "Q6_K": 210}.get(kind, round(32 * ROW_BYTES[kind]))
    raw = rng.integers(0, 256, (rows, round(cols * ROW_BYTES[kind]) // size, size), np.uint8)
    for at in SCALES[kind]:
        scales = rng.normal(size=raw.shape[:2]) * (0.01 if kind in ("Q4_0", "Q4_1") else 3e-4)
        raw[..., at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def values(raw, kind):
    """What the gguf package makes of them."""
    return torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))


def part(raw, kind, cols, heads=0):
    """As `tensors` gives it."""
    return Part(raw, kind, (len(raw), cols), None, 4, 32, heads)


def held(matrix):
    """The weights of a matrix in the layout of csrc/args.h, in plain operations."""
    struct = matrix.struct
    lanes = torch.from_numpy(matrix.data).view(-1, struct.cols // 8, 16, 4)
    codes = torch.stack((lanes & 15, lanes >> 4), 3).transpose(1, 2).flatten(2).flatten(0, 1)

    def factors(x):
        x = torch.from_numpy(x.view(np.float16)).float().view(-1, struct.cols // 32, 16)
        return x.transpose(1, 2).flatten(0, 1).repeat_interleave(32, 1)

    return ((codes.float() - 8) * factors(matrix.scales) + factors(matrix.shifts))[: struct.rows]


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_codes_are_kept(kind, rows):
    """Scales and shifts are rounded to float16, half a unit in the last place; nothing else is."""
    raw = blocks(kind, rows, 512)
    wanted, pool = values(raw, kind), cpu_library.Pool(2)
    stored = Stored(lambda: [part(raw, kind, 512)], (rows, 512), "float32", 4, 32, shifted=True)
    got = held(pack(stored, -1, pool))
    groups = wanted.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
    assert ((got - wanted).unflatten(1, (-1, 32)).abs() <= groups * 2**-10 + 1e-6).all()
    assert np.array_equal(stored.floats(), wanted.numpy())
    for number in KINDS.values():  # and rounded anew where they are not to stay
        plain = pack(wanted, number, pool)
        again = pack(Stored(stored.parts, (rows, 512), "float32"), number, pool)
        assert np.array_equal(again.data, plain.data)


def test_parts_with_and_without_shifts():
    """Of one matrix, with rows of heads to be put in order, in shares that cut panels."""
    kinds = ("Q4_1", "Q4_0", "Q4_1")
    raws = [blocks(kind, 24, 64, seed) for seed, kind in enumerate(kinds)]
    parts = [part(r, k, 64, heads) for r, k, heads in zip(raws, kinds, (6, 0, 0), strict=True)]
    stored = Stored(lambda: parts, (72, 64), "float32", 4, 32, shifted=True)
    wanted = [values(raw, kind) for raw, kind in zip(raws, kinds, strict=True)]
    order = torch.from_numpy(pairs(24, 6))
    got = held(pack(stored, -1, cpu_library.Pool(2)))
    torch.testing.assert_close(got[:24][order], wanted[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(got[24:], torch.cat(wanted[1:]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
@pytest.mark.parametrize("at", [0, 2])
def test_what_is_not_finite_is_refused(kind, at):
    raw = blocks(kind, 20, 512)
    raw[3, at : at + 2] = (0, 124)  # infinity
    stored = Stored(lambda: [part(raw, kind, 512)], (20, 512), "float32", 4, 32, shifted=True)
    pool = cpu_library.Pool(1)
    for matrix in (stored, Stored(stored.parts, (20, 512), "float32")):
        with pytest.raises(ValueError, match="scale of the weights is not finite"):
            pack(matrix, cpu_library.INT8, pool)
    with pytest.raises(ValueError, match="not finite"):
        stored.floats()


def relative(got, wanted):
    """Distance over length."""
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # rows of q and k are interleaved in llama
def test_a_file_in_q4_1_runs_as_stored(tiny_folder, to_gguf, tmp_path, arch):
    # Heads of 20: one token's attention has no kernel of its own, which would sum in another order.
    model, _ = tiny_folder(arch, hidden_size=160, num_attention_heads=8)
    file = to_gguf(model, tmp_path / "m.gguf", arch, kind=GGMLQuantizationType.Q4_1)
    ours = Engine.from_pretrained(file, dtype="float32", backend="cpu", max_context=100)
    plain = Engine.from_pretrained(file, dtype="float32", backend="reference")
    assert (ours.quant, plain.quant) == ("int4", "float32")
    exact, got = plain.logits(IDS), ours.logits(IDS)
    assert relative(got, exact) < 0.02  # activations in 8 bits
    rounded = Engine.from_pretrained(file, dtype="float32", quant="int8", backend="cpu")
    assert relative(got, exact) < 2 * relative(rounded.logits(IDS), exact)
    symmetric = Engine.from_pretrained(model_of(file, tmp_path), quant="int4", backend="cpu")
    assert relative(got, exact) < 0.2 * relative(symmetric.logits(IDS), exact)
    ours.reset()
    one = torch.stack([ours.decode(i) if n else ours.prefill([i]) for n, i in enumerate(IDS)])
    assert torch.equal(one, got) or cpu_library.loaded().level == "amx"
    made = plan.make(file, dtype="float32", context=100, bandwidth=1e9, backend="cpu")
    assert made.weight_bytes == pytest.approx(ours._decoder.weights.nbytes, rel=0.02)
    assert made.quant == "int4" and made.weight_bytes > made.parameters * 5 / 8


def model_of(file, folder):
    """The same weights in float32."""
    convert(file, folder / "plain")
    return folder / "plain"


def test_a_file_of_several_types(tiny_folder, to_gguf, tmp_path, monkeypatch):
    """As "Q4_K_M" is: values in Q6_K beside queries and keys in Q4_K are held in 8 bits together,
    what is in Q6_K alone too, the rest in 4.
    """
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model, _ = tiny_folder("llama", **size)
    file = to_gguf(model, tmp_path / "m.gguf", "llama", kind=GGMLQuantizationType.F16)
    mixed = {"attn_v": "Q6_K", "ffn_down": "Q6_K"}
    read, raw_of = GGUFFile.raw, {}

    def infos(self, count, plain=GGUFFile._tensor_infos):
        """The same tensors in other types, of random bytes."""
        found, by_name = plain(self, count), {kind.name: kind for kind in GGML.values()}
        for name, info in found.items():
            if len(info.shape) == 2:
                kind = "Q4_K" if "blk" in name else "Q4_1"
                kind = mixed.get(name.split(".")[2] if "blk" in name else "", kind)
                raw = raw_of[name] = blocks(kind, *info.shape, seed=len(name) + info.shape[0])
                found[name] = type(info)(name, info.shape, by_name[kind], 0, raw.size)
        return found

    monkeypatch.setattr(GGUFFile, "_tensor_infos", infos)
    monkeypatch.setattr(
        GGUFFile, "raw", lambda file, name: raw_of[name] if name in raw_of else read(file, name)
    )
    ours = Engine.from_pretrained(file, dtype="float32", backend="cpu", max_context=100)
    plain = Engine.from_pretrained(file, dtype="float32", backend="reference", max_context=100)
    layer, four, eight = ours._decoder.weights.layers[1], cpu_library.INT4, cpu_library.INT8
    kinds = [m.struct.kind for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    assert ours.quant == "int4" and kinds == [eight, four, four, eight]
    assert layer.gate_up.shifts is not None and layer.qkv.shifts is None
    exact = plain.logits(IDS)
    rounded = Engine.from_pretrained(file, dtype="float32", quant="int8", backend="cpu",
                                     max_context=100)  # fmt: skip
    assert relative(ours.logits(IDS), exact) < 2 * relative(rounded.logits(IDS), exact)


def test_smollm2s_own_file_is_held_as_it_is():
    """Q4_1: the next word of the file's exact weights, or another where two are as likely."""
    file = testbed.smollm2_gguf()
    ours = Engine.from_pretrained(file, backend="cpu", max_context=512)
    plain = Engine.from_pretrained(file, backend="reference", dtype="float32", max_context=512)
    assert ours.quant == "int4"
    ids = tokenizer.load(Source(file)).encode("The three primary colours are")
    exact, got = plain.logits(ids), ours.logits(ids)
    symmetric = Engine.from_pretrained(
        testbed.smollm2_path(), quant="int4", backend="cpu", max_context=512
    )
    assert relative(got, exact) < 0.2 * relative(symmetric.logits(ids), exact)
    top = exact.topk(2).values
    assert ((got.argmax(1) == exact.argmax(1)) | (top[:, 0] - top[:, 1] < 0.5)).all()
