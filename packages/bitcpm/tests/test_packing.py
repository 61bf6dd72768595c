from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm import PackedTensor, TernaryConfig
from bitcpm.group_size import common_size, fit_sizes
from bitcpm.packing import CODECS, bytes_per_row, pack_codes, unpack_codes
from bitcpm.qat import fake_quantise
from bitcpm.recover import looks_ternary, off_grid_values, on_grid, recover

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_ternary(rows, columns, group_size, dtype, seed, zeros=0.3):
    """Pseudo-quantised weights, with some groups all zero and scales down to subnormals."""
    rng = np.random.default_rng(seed)
    size = columns if group_size == -1 else min(group_size, columns)
    groups = -(-columns // size)
    scales = torch.from_numpy(np.exp(rng.uniform(-18, 2, (rows, groups)))).to(dtype)
    scales[torch.from_numpy(rng.random((rows, groups)) < 0.2)] = 0
    codes = rng.choice([-1, 0, 1], (rows, columns), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    wide = scales.repeat_interleave(size, 1)[:, :columns]
    return torch.where(torch.from_numpy(codes) == 0, 0, torch.from_numpy(codes).to(dtype) * wide)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    group_size=st.sampled_from([-1, 1, 3, 32, 64, 100, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(sorted(CODECS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_bit_exact(rows, columns, group_size, dtype, codec, seed):
    w = random_ternary(rows, columns, group_size, dtype, seed)
    packed = PackedTensor.from_weights(w, group_size, codec)
    back = packed.dequantise()
    assert back.dtype == dtype
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    # + 0.0: a zero group times -1 is -0.0 in the input, and +0.0 after the round trip.
    assert torch.equal((w + 0.0).view(as_int), back.view(as_int))


def test_negative_zero_becomes_zero():
    w = torch.full((1, 16), -0.0)
    assert not torch.signbit(PackedTensor.from_weights(w, 16).dequantise()).any()


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_the_documented_ones(codec):
    per_byte, base = CODECS[codec]
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (3, 23)).astype(np.int8)
    packed = pack_codes(torch.from_numpy(codes), codec)
    assert packed.shape == (3, bytes_per_row(23, codec)) == (3, -(-23 // per_byte))
    for row in range(3):
        digits = [int(c) + 1 for c in codes[row]]
        digits += [1] * (packed.shape[1] * per_byte - 23)
        for i in range(packed.shape[1]):
            place = digits[i * per_byte : (i + 1) * per_byte]
            assert packed[row, i] == sum(d * base**k for k, d in enumerate(place))


def test_all_243_bytes_round_trip_and_no_other_is_accepted():
    everything = torch.arange(256, dtype=torch.uint8)
    codes = unpack_codes(everything[:243, None], 5)
    assert len({tuple(row) for row in codes.tolist()}) == 243
    assert torch.equal(pack_codes(codes)[:, 0], everything[:243])
    for bad in range(243, 256):
        with pytest.raises(ValueError, match="does not use: damaged"):
            unpack_codes(everything[bad, None, None], 5)
    good = [b for b in range(256) if all((b >> s) & 3 < 3 for s in (0, 2, 4, 6))]
    for byte in range(256):
        if byte in good:
            assert pack_codes(unpack_codes(everything[byte, None, None], 4, "2bit"), "2bit") == byte
        else:
            with pytest.raises(ValueError, match="does not use: damaged"):
                unpack_codes(everything[byte, None, None], 4, "2bit")


def test_bits_per_weight():
    w = random_ternary(16, 1280, 128, torch.bfloat16, 0)
    assert PackedTensor.from_weights(w, 128, "1.6bit").bits_per_weight == pytest.approx(1.725)
    assert PackedTensor.from_weights(w, 128, "2bit").bits_per_weight == pytest.approx(2.125)


@pytest.mark.parametrize("quant", ("TQ1_0", "TQ2_0"))
def test_codes_equal_those_of_ggmls_ternary_types(quant):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[quant]
    w = fake_quantise(torch.randn(6, 1024), TernaryConfig(group_size=256)).half().float()
    theirs = gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind)
    codes, scales = PackedTensor.from_weights(w, 256).unpack()
    np.testing.assert_array_equal(np.sign(theirs).astype(np.int8), codes.numpy())
    np.testing.assert_array_equal(np.abs(theirs).reshape(6, 4, 256).max(-1), scales.numpy())
    np.testing.assert_array_equal(theirs, PackedTensor.from_weights(w, 256).dequantise().numpy())


def test_recover_points_at_the_first_bad_group():
    w = random_ternary(4, 96, 32, torch.float32, 1, zeros=0.0).abs() + 1.0
    w = w.reshape(4, 3, 32).amax(-1, keepdim=True).expand(4, 3, 32).reshape(4, 96).clone()
    recover(w, 32)
    w[2, 40] *= 0.5
    assert off_grid_values(w, 32) == 1 and int((~on_grid(w, 32)).sum()) == 1
    with pytest.raises(ValueError, match="up_proj is not ternary.*1 of 12 groups.*row 2, group 1"):
        recover(w, 32, "up_proj")
    for bad in (float("nan"), float("inf")):
        w[2, 32:64] = bad
        assert not on_grid(w, 32)[2, 1]


def test_looks_ternary():
    dense = torch.randn(64, 128)
    assert not looks_ternary(dense) and not looks_ternary(dense.bfloat16())
    assert not looks_ternary(torch.zeros(4, 64)) and not looks_ternary(torch.ones(4, 4))
    for group_size in (32, 128, -1):
        q = fake_quantise(dense, TernaryConfig(group_size=group_size))
        assert looks_ternary(q)
        q[60, 100] = 1.5 * q.abs().max()  # off the grid also where the code is 0
        assert not looks_ternary(q)


@pytest.mark.parametrize("group_size", (8, 24, 32, 96, 100, 128, 256, -1))
@pytest.mark.parametrize("columns", (200, 256, 768))
def test_group_size_is_found(group_size, columns):
    w = fake_quantise(torch.randn(64, columns), TernaryConfig(group_size=group_size))
    fit = fit_sizes(w)
    assert fit.largest() == (group_size if -1 < group_size < columns else -1)
    # Brute force: a size fits exactly where every group is on the grid.
    for size in (*range(8, columns + 3, 7), group_size, -1):
        assert fit.allows(size) == bool(on_grid(w, size).all())


def test_common_size_of_several_matrices():
    def fit(columns, group_size):
        return fit_sizes(
            fake_quantise(torch.randn(32, columns), TernaryConfig(group_size=group_size))
        )

    assert common_size([]) is None
    assert common_size([fit(64, -1), fit(96, -1)]) == -1
    assert common_size([fit(64, 128), fit(256, 128), fit(300, 128)]) == 128
    assert common_size([fit(256, 64), fit(256, 128)]) == 64
    # One scale for a row can be repeated for each of its groups.
    assert common_size([fit(256, -1), fit(512, 128)]) == 128
    assert common_size([fit(256, 9), fit(256, 128)]) is None


def test_packed_tensor_checks_its_parts():
    good = PackedTensor.from_weights(random_ternary(4, 70, 32, torch.float16, 2), 32)
    with pytest.raises(ValueError, match=r"codes of a \(4, 71\) matrix must be uint8 \[4, 15\]"):
        PackedTensor(good.codes, good.scales, (4, 71), 32)
    with pytest.raises(ValueError, match=r"must be float \[4, 2\], got torch.float16 \[4, 3\]"):
        PackedTensor(good.codes, good.scales, (4, 70), 64)
    with pytest.raises(ValueError, match="both >= 1"):
        PackedTensor(good.codes, good.scales, (4, 0), 32)
    with pytest.raises(ValueError, match="codec must be one of 2bit, 1.6bit"):
        PackedTensor(good.codes, good.scales, (4, 70), 32, "3bit")
    good.scales[0, 0] = -1
    with pytest.raises(ValueError, match="finite and >= 0"):
        good.dequantise()
    used = good.codes.clone()
    used[:, -1] = 242
    narrow = PackedTensor(used, good.scales.abs(), (4, 69), 32)
    with pytest.raises(ValueError, match="beyond column 69"):
        narrow.unpack()


def test_codes_of_other_grids_are_refused():
    with pytest.raises(ValueError, match="only the ternary grid"):
        pack_codes(torch.tensor([[2, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="int8"):
        pack_codes(torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match=r"uint8 \[out, 2\]"):
        unpack_codes(torch.zeros(1, 3, dtype=torch.uint8), 10)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("group_size", (32, 100, -1))
def test_packing_again_changes_nothing(codec, group_size):
    w = random_ternary(12, 260, group_size, torch.bfloat16, 5) + 0.0
    once = PackedTensor.from_weights(w, group_size, codec)
    twice = PackedTensor.from_weights(once.dequantise(), group_size, codec)
    assert torch.equal(once.codes, twice.codes) and torch.equal(once.scales, twice.scales)
    codes, scales = recover(w, group_size)
    again = recover(once.dequantise(), group_size)
    assert torch.equal(codes, again[0]) and torch.equal(scales, again[1])
