"""Checks of the Triton kernels; run as a program it runs them in Triton's interpreter."""

from __future__ import annotations

import itertools
import os
import sys

import torch


def check_products(device: str) -> None:
    """Odd shapes, groups, tails, few and many tokens, against float64."""
    from bitcpm import PackedTensor
    from bitcpm.triton_linear import TritonTernaryLinear

    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7, -1), (70, 130, 32), (33, 300, 100), (66, 64, 3)]
    dtypes = (torch.float32, torch.float16)
    for (O, I, g), dtype, T in itertools.product(shapes, dtypes, (1, 3, 5, 33)):
        size = I if g == -1 else g
        codes = torch.randint(-1, 2, (O, I), generator=generator)
        scales = torch.rand(O, -(-I // size), generator=generator) + 0.5
        w = (codes * scales.repeat_interleave(size, 1)[:, :I]).to(dtype)
        bias = torch.randn(O, generator=generator).to(dtype) if T != 3 else None
        layer = TritonTernaryLinear(PackedTensor.from_weights(w, g), bias).to(device)
        x = torch.randn(1, T, 2 * I, generator=generator).to(dtype)[..., ::2].to(device)
        for view in (x, x.contiguous()[:, :1]):
            out = layer(view)
            truth = view.double().cpu() @ w.double().T + (0 if bias is None else bias.double())
            bound = view.double().cpu().abs() @ w.double().abs().T + 1
            error = (out.double().cpu() - truth).abs() / bound
            allowed = 1e-6 if dtype == torch.float32 else 1e-3
            assert out.dtype == dtype and out.shape == truth.shape
            assert error.max() < allowed, f"{(O, I, g, T)}, {dtype}: off by {error.max()}"
    layer = TritonTernaryLinear(PackedTensor.from_weights(torch.ones(4, 8), -1)).to(device)
    assert layer(torch.ones(0, 8, device=device)).shape == (0, 4)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    assert "triton" not in sys.modules
    check_products("cpu")
    print("ok")
