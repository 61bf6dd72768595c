"""Every product of the CPU kernels against oracles in int64 and float64; prints a digest.

Run as a program so that `BITCPM_CPU_LEVEL` can choose the level: `test_kernels.py` compares the
digests of all levels.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from bitcpm.cpu_library import CODECS, MODES
from bitcpm.matrix import TernaryMatrix, required_kernels
from bitcpm.packing import PackedTensor, pack_codes

# (O, I, group size): blocks, strips and panels that are full, not full and single; groups that are
# shorter and longer than a span (240), tails, columns that no vector divides.
SHAPES = [
    (1, 1, -1), (3, 8, 8), (64, 128, 128), (65, 511, 100), (70, 300, 32), (130, 777, 128),
    (200, 1000, -1), (260, 245, 250), (300, 130, 5), (448, 320, 64), (1100, 200, 128),
    (64, 2000, 300), (576, 96, 32),
]  # fmt: skip
TOKENS = (1, 2, 4, 5, 7, 13)
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_packed(O, I, g, scale_dtype, codec, seed=0):
    """A PackedTensor of random codes and scales, some of them zero."""
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(-1, 2, (O, I)).astype(np.int8))
    size = I if g == -1 else min(g, I)
    scales = torch.from_numpy(rng.uniform(0.25, 2, (O, -(-I // size))))
    scales[torch.from_numpy(rng.random(scales.shape) < 0.05)] = 0
    return PackedTensor(pack_codes(codes, codec), scales.to(scale_dtype), (O, I), g, codec)


def int8_oracle(x, packed, by_group):
    """What modes "int8" and "int8-group" are, from their definition: int64 sums, float32 order."""
    codes, scales = packed.unpack()
    I = packed.shape[1]
    size = I if packed.group_size == -1 else min(packed.group_size, I)
    x, codes, scales = x.float().numpy(), codes.numpy().astype(np.int64), scales.float().numpy()
    one = np.float32(1)
    y = np.zeros((len(x), packed.shape[0]), np.float32)
    most = np.abs(x).max(1, keepdims=True)
    for g in range(scales.shape[1]):
        part = slice(g * size, min((g + 1) * size, I))
        if by_group:
            most = np.abs(x[:, part]).max(1, keepdims=True)
        factor = np.where(most > 0, np.float32(127) / np.where(most > 0, most, one), 0)
        q = np.rint(x[:, part] * factor.astype(np.float32)).astype(np.int64)
        total = (q @ codes[:, part].T).astype(np.float32)
        weight = scales[:, g][None]
        if by_group:
            weight = weight * (most / np.float32(127))
        y = y + total * weight
    return y if by_group else y * (most / np.float32(127))


def check_random() -> str:
    """All shapes, codecs, modes and dtypes; returns the digest of all results."""
    digest = hashlib.sha256()
    for number, (O, I, g) in enumerate(SHAPES):
        scale_dtype = X_DTYPES[number % 3]
        for T in (*TOKENS, 530) if number == 2 else TOKENS:
            x_dtype = X_DTYPES[(number + T) % 3]
            x = torch.randn(T, I, generator=torch.Generator().manual_seed(T)).to(x_dtype)
            x[0, 0] = 0.0
            results = {}
            for codec in CODECS:
                packed = random_packed(O, I, g, scale_dtype, codec, number)
                matrix = TernaryMatrix.from_packed(packed)
                back = matrix.to_packed()
                assert torch.equal(back.codes, packed.codes), "codes do not come back"
                assert torch.equal(back.scales, packed.scales), "scales do not come back"
                for mode in MODES:
                    out = matrix.multiply(x, None, mode)
                    same = results.setdefault(mode, out)
                    assert torch.equal(same, out), f"codecs differ: {O, I, g, T, mode}"
            for mode, out in results.items():
                where = f"{(O, I, g, T)}, {mode}, {x_dtype}, scales {scale_dtype}"
                if mode == "exact":
                    truth = x.double() @ packed.dequantise(torch.float64).T
                    bound = x.double().abs() @ packed.dequantise(torch.float64).abs().T
                    error = (out.double() - truth).abs()
                    rounding = torch.finfo(x_dtype).eps if x_dtype != torch.float32 else 0
                    # An fp16 result below 6e-5 is subnormal: half of 2^-24 is its rounding.
                    allowed = bound * 1e-5 + truth.abs() * rounding + 2.0**-24
                    assert bool((error <= allowed).all()), f"{where}: off by {error.max()}"
                else:
                    wanted = torch.from_numpy(int8_oracle(x, packed, mode == "int8-group"))
                    assert torch.equal(out, wanted.to(x_dtype)), where
                digest.update(out.float().numpy().tobytes())
    return digest.hexdigest()


def check_largest_sums() -> None:
    """All codes +1, all activations 127 (and -127), K = 65,536: the int64 sum, exactly."""
    I = 65536
    codes = torch.ones(70, I, dtype=torch.int8)
    codes[1] = -1
    codes[2, ::2] = 0
    for g, codec in ((-1, "1.6bit"), (-1, "2bit"), (128, "1.6bit"), (1 << 15, "2bit")):
        groups = 1 if g == -1 else I // g
        packed = PackedTensor(pack_codes(codes, codec), torch.ones(70, groups), (70, I), g, codec)
        matrix = TernaryMatrix.from_packed(packed)
        for T in (1, 5):
            x = torch.full((T, I), 127.0)
            x[-1] *= -1
            wanted = (x.long() @ codes.long().T).float()
            for mode in ("int8", "int8-group") if T == 1 else ("int8",):
                assert torch.equal(matrix.multiply(x, None, mode), wanted), f"{g, codec, T, mode}"


def check_all_bytes() -> None:
    """All 243 chunks of five codes, each with activations that tell them apart."""
    codes = np.array(np.unravel_index(np.arange(243), (3,) * 5)).T.astype(np.int8) - 1
    x = torch.tensor([[127.0, 96, -57, 31, -11], [-127, 127, -127, 127, -127], [1, 3, 9, 27, 127]])
    packed = PackedTensor(
        pack_codes(torch.from_numpy(codes)), torch.ones(243, 1), (243, 5), -1, "1.6bit"
    )
    matrix = TernaryMatrix.from_packed(packed)
    wanted = (x.long() @ torch.from_numpy(codes).long().T).float()
    for row in range(3):
        assert torch.equal(matrix.multiply(x[row : row + 1]), wanted[row : row + 1])
    assert torch.equal(matrix.multiply(x.repeat(4, 1)), wanted.repeat(4, 1))


if __name__ == "__main__":
    check_all_bytes()
    check_largest_sums()
    print(required_kernels().level, check_random())
