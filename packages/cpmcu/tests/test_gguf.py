"""GGUF files written by the gguf package, and files no honest program would write."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from cpmcu import Engine
from cpmcu.gguf_file import GGUFFile
from cpmcu.spec_gguf import from_gguf

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@torch.inference_mode()
def oracle(model, ids=IDS):
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("name", "arch"),
    [("llama-gqa3", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
@pytest.mark.parametrize("tie", [False, True])
def test_logits_of_every_architecture(tiny_folder, to_gguf, tmp_path, name, arch, tie):
    model, _ = tiny_folder(name, tie_word_embeddings=tie)
    file = to_gguf(model, tmp_path / "m.gguf", arch)
    engine = Engine.from_pretrained(file, dtype="float32")
    assert engine.spec.tie == tie
    torch.testing.assert_close(engine.logits(IDS), oracle(model), atol=1e-5, rtol=1e-5)


def test_minicpm_scales(tiny_folder, to_gguf, tmp_path):
    model, _ = tiny_folder("minicpm4")
    f32, c = 6, model.config  # GGUFValueType.FLOAT32
    scales = {
        "embedding_scale": (c.scale_emb, f32),
        "residual_scale": (c.scale_depth / c.num_hidden_layers**0.5, f32),
        "logit_scale": (c.hidden_size / c.dim_model_base, f32),
    }
    file = to_gguf(model, tmp_path / "m.gguf", "minicpm", **scales)
    engine = Engine.from_pretrained(file, dtype="float32")
    torch.testing.assert_close(engine.logits(IDS), oracle(model), atol=1e-4, rtol=1e-4)


def test_rope_factors(tiny_folder, to_gguf, tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
        "original_max_position_embeddings": 12,
        "attention_factor": 1.25,
    }
    model, _ = tiny_folder("llama", rope_parameters=rope)
    factors = {f"rope_factors_{n}.weight": rope[f"{n}_factor"] for n in ("long", "short")}
    extra = {
        "rope.scaling.type": ("longrope", 8),
        "rope.scaling.original_context_length": (12, 4),
        "rope.scaling.attn_factor": (1.25, 6),
    }
    file = to_gguf(model, tmp_path / "m.gguf", "llama", factors=factors, **extra)
    engine = Engine.from_pretrained(file, dtype="float32")
    for ids in (IDS[:8], IDS):  # below and above the original length
        torch.testing.assert_close(engine.logits(ids), oracle(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_expanded_exactly(tiny_folder, to_gguf, tmp_path, kind):
    quant = GGMLQuantizationType[kind]
    model, _ = tiny_folder("qwen2")
    file = GGUFFile(to_gguf(model, tmp_path / "m.gguf", "qwen2", kind=quant))
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    wanted = torch.from_numpy(dequantize(quantize(weight, quant), quant))
    assert torch.equal(file.read("blk.1.ffn_down.weight"), wanted)
    assert not torch.equal(wanted, torch.from_numpy(weight))
    assert bool(Engine.from_pretrained(file.path).logits(IDS).isfinite().all())


@pytest.mark.parametrize(
    "kind", ["Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K", "TQ1_0", "TQ2_0", "IQ4_NL"]
)
def test_formats_gguf_reads_but_may_not_write(tmp_path, kind):
    """Random bytes in the format's block size: in pieces as in one call of the dequantiser."""
    from gguf.constants import GGML_QUANT_SIZES

    quant = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[quant]
    raw = np.random.default_rng(0).integers(0, 255, (40, 2048 // block * size), dtype=np.uint8)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    import cpmcu.gguf_file as module

    file = GGUFFile(tmp_path / "m.gguf")
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(module, "_PIECE", 3 * 2048)
        assert len(list(file.pieces("x"))) == 14
        wanted = torch.from_numpy(dequantize(raw, quant).astype(np.float32))
        torch.testing.assert_close(file.read("x"), wanted, atol=0, rtol=0, equal_nan=True)


def header(fields=b"", field_count=0, tensors=b"", tensor_count=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, field_count) + fields + tensors


def text(value):
    return struct.pack("<Q", len(value)) + value


def tensor(name=b"x", shape=(32,), kind=0, offset=0):
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


HOSTILE = {
    "empty": (b"", "too few for a GGUF header"),
    "not gguf": (b"\x80\x04" + bytes(100), "does not start with 'GGUF'"),
    "big endian": (header(version=3 << 24), "version 50331648"),
    "fields beyond the end": (header(field_count=2**63), "truncated or corrupt"),
    "tensors beyond the end": (header(tensor_count=2**64 - 1), "truncated or corrupt"),
    "huge key": (header(struct.pack("<Q", 2**62), 1), "truncated or corrupt"),
    "unknown type": (header(text(b"k") + struct.pack("<I", 99), 1), "'k' has unknown type 99"),
    "huge array of texts": (
        header(text(b"k") + struct.pack("<IIQ", 9, 8, 2**60), 1),
        "truncated or corrupt",
    ),
    "huge array of numbers": (
        header(text(b"k") + struct.pack("<IIQ", 9, 10, 2**61), 1),
        "truncated or corrupt",
    ),
    "array of arrays": (
        header(text(b"k") + struct.pack("<IIQ", 9, 9, 3), 1),
        "'k' is an array of unknown type 9",
    ),
    "key twice": (header((text(b"k") + struct.pack("<IB", 0, 1)) * 2, 2), "key 'k' twice"),
    "no utf-8": (header(text(b"\xff\xfe"), 1), "not UTF-8"),
    "no dimensions": (header(b"", 0, tensor(shape=()), 1), "has 0 dimensions"),
    "many dimensions": (header(b"", 0, tensor(shape=(1,) * 9), 1), "has 9 dimensions"),
    "elements overflow": (
        header(b"", 0, tensor(shape=(2**32, 2**32, 2**32)), 1),
        "truncated or corrupt",
    ),
    "zero dimension": (header(b"", 0, tensor(shape=(0,)), 1) + bytes(64), "does not fill"),
    "half a block": (header(b"", 0, tensor(shape=(33,), kind=8), 1), "does not fill Q8_0"),
    "unknown tensor type": (header(b"", 0, tensor(kind=777), 1), "unknown type 777"),
    "unaligned": (header(b"", 0, tensor(offset=3), 1) + bytes(512), "lies at bytes"),
    "offset overflow": (header(b"", 0, tensor(offset=2**64 - 32), 1) + bytes(512), "lies at"),
    "same tensor twice": (header(b"", 0, tensor() * 2, 2) + bytes(512), "tensor 'x' twice"),
    "alignment": (
        header(text(b"general.alignment") + struct.pack("<II", 4, 0), 1) + bytes(64),
        "must be a power of two, got 0",
    ),
    "no architecture": (header() + bytes(64), "'general.architecture' is missing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"hostile.gguf: .*{message}"):
        from_gguf(GGUFFile(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scaling.type": ("yarn", 8)}, "'llama.rope.scaling.type' is 'yarn'"),
        ({"expert_count": (8, 4)}, "'llama.expert_count' must be 0"),
        ({"rope.dimension_count": (8, 4)}, "'llama.rope.dimension_count' must be 16"),
    ],
)
def test_unsupported_metadata_names_the_field(tiny_folder, to_gguf, tmp_path, changes, message):
    model, _ = tiny_folder("llama")
    with pytest.raises(ValueError, match=message):
        from_gguf(GGUFFile(to_gguf(model, tmp_path / "m.gguf", "llama", **changes)))


def test_other_architecture_is_named(tiny_folder, to_gguf, tmp_path):
    model, _ = tiny_folder("llama")
    with pytest.raises(ValueError, match="'general.architecture' is 'gemma', supported are llama"):
        Engine.from_pretrained(to_gguf(model, tmp_path / "m.gguf", "gemma"))


def test_types_are_those_of_the_gguf_package():
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    from cpmcu import ggml_types

    for number, kind in ggml_types.KINDS.items():
        theirs = GGMLQuantizationType(number)
        assert (kind.name, (kind.block, kind.size)) == (theirs.name, GGML_QUANT_SIZES[theirs])
    iq = GGMLQuantizationType.IQ4_NL
    assert ggml_types.kind_of(int(iq)) == ("IQ4_NL", int(iq), *GGML_QUANT_SIZES[iq])
    assert ggml_types.kind_of(9999) is None
