from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm import PackedTensor
from bitcpm.ggml_types import (
    BLOCKS,
    dequantise_ggml,
    exact_kinds,
    fits,
    from_ggml,
    to_ggml,
)
from bitcpm.packing import pack_codes

gguf = pytest.importorskip("gguf")


def random_packed(rows, columns, group, dtype, seed=0):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(-1, 2, (rows, columns)).astype(np.int8))
    size = columns if group == -1 else min(group, columns)
    scales = torch.from_numpy(np.exp(rng.uniform(-7, 2, (rows, -(-columns // size)))))
    scales[torch.from_numpy(rng.random(scales.shape) < 0.1)] = 0
    return PackedTensor(pack_codes(codes), scales.to(dtype), (rows, columns), group)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize(("group", "dtype"), [(256, torch.float16), (-1, torch.bfloat16)])
def test_bytes_equal_those_of_ggmls_quantiser(kind, group, dtype):
    packed = random_packed(17, 1024, group, dtype)
    # A group whose codes are all zero has no scale in ggml's bytes.
    w = packed.dequantise(torch.float32).numpy()
    ours = to_ggml(packed, kind)
    theirs = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(ours.data, theirs)
    assert ours.error == 0
    np.testing.assert_array_equal(dequantise_ggml(ours).numpy(), w)


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_ggml_reads_is_what_was_packed(kind):
    packed = random_packed(9, 768, 256, torch.float16, seed=3)
    data = to_ggml(packed, kind).data
    read = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(read, packed.dequantise(torch.float32).numpy())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8),
    blocks=st.integers(1, 4),
    kind=st.sampled_from(sorted(BLOCKS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_export_import_unpack_round_trips(rows, blocks, kind, seed):
    size, _ = BLOCKS[kind]
    w = random_packed(rows, size * blocks, size, torch.float16, seed).dequantise()
    packed = PackedTensor.from_weights(w, size)
    back = from_ggml(to_ggml(packed, kind).data, kind, packed.shape, "2bit")
    assert torch.equal(back.dequantise(), w)
    again = to_ggml(back, kind)
    np.testing.assert_array_equal(again.data, to_ggml(packed, kind).data)


def test_a_type_that_cannot_hold_the_scales_is_refused_with_the_error():
    packed = random_packed(8, 512, 128, torch.float16, seed=1)
    assert exact_kinds(packed) == ["Q4_0"]
    assert not fits(512, 128, "TQ2_0") and fits(512, 128, "Q4_0") and fits(512, -1, "TQ1_0")
    with pytest.raises(
        ValueError, match=r"TQ2_0 has one fp16 scale for 256.*relative error 0\.0\d"
    ):
        to_ggml(packed, "TQ2_0")
    lossy = to_ggml(packed, "TQ2_0", allow_error=True)
    w = packed.dequantise(torch.float32)
    wanted = ((dequantise_ggml(lossy) - w).norm() / w.norm()).item()
    assert lossy.error == pytest.approx(wanted, rel=1e-5) and 0.01 < lossy.error < 1
    theirs = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.TQ2_0)
    np.testing.assert_array_equal(lossy.data, theirs)


def test_bf16_scales_that_fp16_rounds_are_refused():
    w = torch.full((2, 256), 2.0**-20, dtype=torch.bfloat16) * 1.0078125
    packed = PackedTensor.from_weights(w, -1)
    with pytest.raises(ValueError, match="bfloat16 scales: relative error"):
        to_ggml(packed, "TQ1_0")
    assert 0 < to_ggml(packed, "TQ1_0", allow_error=True).error < 0.05


def test_errors_say_what_is_wrong():
    packed = random_packed(2, 300, -1, torch.float16)
    with pytest.raises(ValueError, match="whole blocks of 256 weights, got rows of 300"):
        to_ggml(packed, "TQ2_0")
    with pytest.raises(ValueError, match="kind must be one of TQ1_0, TQ2_0, Q4_0; got 'Q2_K'"):
        to_ggml(packed, "Q2_K")
    with pytest.raises(ValueError, match=r"must be uint8 \[2, 66\]"):
        from_ggml(np.zeros((2, 65), np.uint8), "TQ2_0", (2, 256))
    with pytest.raises(ValueError, match="not ternary"):
        from_ggml(np.full((1, 66), 255, np.uint8), "TQ2_0", (1, 256))
    nan = np.zeros((1, 66), np.uint8)
    nan[0, 64:] = 0xFF
    with pytest.raises(ValueError, match="damaged"):
        from_ggml(nan, "TQ2_0", (1, 256))
