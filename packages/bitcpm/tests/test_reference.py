from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitcpm.config import GRIDS, TernaryConfig
from bitcpm.qat import fake_quantise
from bitcpm.reference import code_unit, dequantise, quantise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((5, 128), (3, 200), (1, 1), (7, 31), (4, 256))


def by_hand(w: torch.Tensor, group_size: int, eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """The paper's formula, one weight at a time, in double precision."""
    rows, columns = w.shape
    size = columns if group_size == -1 else group_size
    codes, scales = np.zeros((rows, columns), int), []
    for row in range(rows):
        scales.append([])
        for start in range(0, columns, size):
            group = w[row, start : start + size].double()
            s = max(sum(abs(v) for v in group.tolist()) / len(group), eps)
            s = torch.tensor(s, dtype=torch.float32).to(w.dtype).double().item()
            scales[-1].append(s)
            for i, v in enumerate(group.tolist()):
                # Python rounds halves to even, as the paper's PyTorch does.
                codes[row, start + i] = min(1, max(-1, round(v / s)))
    return codes, np.array(scales)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", (32, 100, 128, -1, 1))
def test_equals_the_formula_in_double_precision(shape, group_size):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scales = quantise(w, TernaryConfig(group_size=group_size))
    expected_codes, expected_scales = by_hand(w, group_size)
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_allclose(scales.numpy(), expected_scales, rtol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_has_the_formulas_codes(dtype):
    # Exhaustive over the ties: every multiple of 1/16 of a scale that is a power of two.
    w = torch.arange(-32, 32).to(dtype) / 16
    w = torch.cat([w, w.flip(0)]).reshape(2, 64)
    codes, scales = quantise(w, TernaryConfig(group_size=64))
    expected_codes, expected_scales = by_hand(w, 64)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(scales.double().numpy(), expected_scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", (32, 48, 64, 128, 256, -1))
@pytest.mark.parametrize("shape", SHAPES)
def test_qat_forward_equals_the_reference(dtype, grid, group_size, shape):
    config = TernaryConfig(group_size=group_size, grid=grid)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    q = fake_quantise(w, config)
    assert torch.equal(q, dequantise(*quantise(w, config), config))
    assert q.dtype == dtype
    assert not torch.signbit(q[q == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_in_the_weights_dtype_are_those_of_exact_division(dtype):
    # Weights at and next to half the scale are where a rounded quotient could go wrong.
    for seed in range(50):
        w = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for _ in range(3):
            _, scales = quantise(w, TernaryConfig(group_size=64))
            half = (scales / 2).expand(4, 16)
            w[:, :16] = half
            w[:, 16:32] = torch.nextafter(half, torch.zeros_like(half))
            w[:, 32:48] = torch.nextafter(half, torch.full_like(half, 9))
        s = quantise(w, TernaryConfig(group_size=64))[1].double()
        exact = torch.where(w.double().abs() > s / 2, w.double().sign(), 0.0)
        q = fake_quantise(w, TernaryConfig(group_size=64))
        assert torch.equal(q.double(), exact * s)


@pytest.mark.parametrize("grid", GRIDS)
def test_values_are_the_grids_levels(grid):
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
    config = TernaryConfig(group_size=128, grid=grid)
    codes, scales = quantise(w, config)
    assert set((codes.double() * code_unit(grid)).unique().tolist()) == set(GRIDS[grid])
    values = dequantise(codes, scales, config).reshape(6, 4, 128)
    for group in values.flatten(0, 1):
        assert len(group.unique()) <= len(GRIDS[grid])


@pytest.mark.parametrize("grid", [g for g in GRIDS if g != "ternary"])
def test_other_grids_take_the_nearest_level(grid):
    w = torch.randn(4, 96, generator=torch.Generator().manual_seed(4))
    codes, scales = quantise(w, TernaryConfig(group_size=96, grid=grid))
    outermost = 1.5 if "symmetric" in grid and grid != "integer-symmetric" else 2.0
    torch.testing.assert_close(scales[:, 0], w.abs().amax(1) / outermost)
    levels = torch.tensor(GRIDS[grid]) * scales[:, :, None]
    best = (w[:, :, None] - levels).abs().amin(-1)
    ours = (w - dequantise(codes, scales, TernaryConfig(group_size=96, grid=grid))).abs()
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_zeros_is_zeros(dtype):
    w = torch.zeros(2, 64, dtype=dtype)
    w[1, 32:] = 3.0
    config = TernaryConfig(group_size=32, eps=1e-30)
    codes, scales = quantise(w, config)
    assert (codes[1, 32:] == 1).all() and not codes[0].any() and not codes[1, :32].any()
    assert (scales > 0).all()
    assert torch.equal(dequantise(codes, scales, config), w)


def test_absmean_is_not_idempotent():
    # Why recover() exists: each pass multiplies the scale by the share of non-zeros.
    w = torch.randn(1, 4096, generator=torch.Generator().manual_seed(5))
    config = TernaryConfig(group_size=-1)
    once = fake_quantise(w, config)
    twice = fake_quantise(once, config)
    nonzero = (once != 0).float().mean()
    assert 0.6 < nonzero < 0.8
    torch.testing.assert_close(twice.abs().max(), once.abs().max() * nonzero)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"weight matrix \[out, in\], got shape \[3\]"):
        quantise(torch.ones(3))
    with pytest.raises(ValueError, match="got torch.int64"):
        quantise(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match=r"scales must be \[2, 2\]"):
        dequantise(torch.zeros(2, 200, dtype=torch.int8), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("group_size", 0, "group_size must be >= 1, or -1"),
        ("group_size", -2, "group_size must be >= 1, or -1"),
        ("group_size", 1.5, "whole number"),
        ("grid", "binary", "grid must be one of ternary"),
        ("eps", 0.0, "eps must be"),
        ("skip", "lm_head", "tuple of module names"),
    ],
)
def test_config_is_validated(field, value, match):
    with pytest.raises(ValueError, match=match):
        TernaryConfig(**{field: value})


def test_config_round_trip_and_skip_rule():
    config = TernaryConfig(group_size=64, skip=("lm_head", "layers.0", "mlp"))
    assert TernaryConfig(**config.to_dict()) == config
    assert config.skips("model.layers.0.self_attn.q_proj") and config.skips("lm_head")
    assert config.skips("model.layers.1.mlp.up_proj")
    assert not config.skips("model.layers.01.self_attn") and not config.skips("my_lm_head")
