"""Checks of the GPU backend, run in Triton's interpreter by test_gpu_*.py, or on a GPU.

Each takes the device first. In the interpreter they run in a process of their own: Triton reads
TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cpmcu import Engine, SparseAttention

SMALL = SparseAttention(
    kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=3,
    dense_len=100,
)  # fmt: skip


def ids_of(count: int, seed: int = 3) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- products


def product(device: str, bits: int, group: int, O: int, I: int, dtype: torch.dtype) -> None:
    """Errors against float64 are at most twice those of PyTorch on the dequantised weights."""
    from cpmcu.codes import nearest
    from cpmcu.gpu_weights import IntWeights
    from cpmcu.triton_linear import multiply

    generator = torch.Generator().manual_seed(O + I)
    weight = torch.randn(O, I, generator=generator)
    weight[0, :group] = 0.0
    codes = nearest(weight, bits, group)
    packed = IntWeights.of(codes, torch.device(device))
    assert packed.shape == (O, I) and packed.group == group
    everything = torch.arange(O, device=device)
    assert torch.equal(packed.rows(everything, torch.float32).cpu(), codes.dequantise())
    for T in (1, 3, 17, 130):
        x = torch.randn(T, 2 * I, generator=generator).to(dtype)[:, :I].to(device)
        bias = torch.randn(O, generator=generator).to(device, dtype) if T in (1, 17) else None
        got = multiply(x, packed, bias)
        assert got.dtype == dtype and got.shape == (T, O)
        truth = x.double() @ codes.dequantise().double().to(device).T
        truth = truth if bias is None else truth + bias.double()
        plain = torch.nn.functional.linear(x, codes.dequantise(dtype).to(device), bias)
        ours, theirs = ((y.double() - truth).norm() for y in (got, plain))
        assert ours <= 2 * theirs, (bits, group, O, I, T, dtype, float(ours), float(theirs))
    assert multiply(torch.empty(0, I, dtype=dtype, device=device), packed).shape == (0, O)


def refused_products(device: str) -> None:
    """An error that says what was expected."""
    from cpmcu.codes import nearest
    from cpmcu.gpu_weights import IntWeights
    from cpmcu.triton_linear import multiply

    weights = IntWeights.of(nearest(torch.ones(4, 64), 4, 32), torch.device(device))
    for x in (torch.ones(2, 32), torch.ones(64), torch.ones(2, 128)[:, ::2]):
        with pytest.raises(ValueError, match=r"x must be \[tokens, 64\]"):
            multiply(x.to(device), weights)


def refused_strides(device: str) -> None:
    """The other kernels read memory as it lies, and say what they need."""
    from cpmcu.triton_decode import decode
    from cpmcu.triton_rotate import rotate
    from cpmcu.triton_rows import add_norm, gated

    x = torch.ones(4, 64, device=device)
    apart, at = x[:, ::2], torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="gate_up must be contiguous"):
        gated(apart)
    with pytest.raises(ValueError, match="y must be contiguous"):
        add_norm(apart.contiguous(), apart, x[0, :32], alpha=1.0, eps=1e-6)
    keys = torch.ones(1, 8, 32, device=device)
    with pytest.raises(ValueError, match="q and each head of k and v must be contiguous"):
        decode(apart, keys, keys, at)
    arena, tables = (
        torch.ones(2, 1, 8, 16, device=device),
        (torch.ones(8, 1, 16, device=device),) * 2,
    )
    with pytest.raises(ValueError, match="qkv and arena must be contiguous and of one dtype"):
        rotate(x, (None, None), tables, at, arena.bfloat16(), 2, 1e-6)


# --- attention of one token


def decode(
    device: str, G: int, K: int, D: int, dtype: torch.dtype, window: int | None = None
) -> None:
    """One launch for every length, whatever lies behind it, against float64."""
    from cpmcu import triton_decode

    S = 300
    generator = torch.Generator().manual_seed(G + D)
    k, v = torch.randn(2, K, S, D, generator=generator).to(device, dtype)
    for length in (1, 63, 64, 65, 200, 300):
        q = torch.randn(K * G, D, generator=generator).to(device, dtype)
        k[:, length:] = v[:, length:] = float("nan")
        at = torch.tensor([length - 1], device=device)
        got = triton_decode.decode(q, k, v, at, window=window)
        first = max(0, length - (window or length))
        seen = [x[None, :, first:length].double() for x in (k, v)]
        attention = torch.nn.functional.scaled_dot_product_attention
        truth = attention(q[None, :, None].double(), *seen, enable_gqa=True)[0, :, 0]
        limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert got.dtype == dtype and (got.double() - truth).abs().max() < limit, length
        k, v = torch.randn(2, K, S, D, generator=generator).to(device, dtype)


def rotation(device: str, G: int, K: int, D: int, dtype: torch.dtype, norm: bool) -> None:
    """What PyTorch does in six operations, in float64; nothing else of the cache changes."""
    from cpmcu.rope import Rope, RopeTable
    from cpmcu.triton_rotate import rotate

    H, S, generator = K * G, 40, torch.Generator().manual_seed(D)
    tables = RopeTable(Rope(), D, dtype, torch.device(device)).rows(0, S, length=S)
    norms = torch.rand(2, D, generator=generator).to(device, dtype) if norm else (None, None)
    for T, position in ((1, 0), (1, 39), (19, 20)):
        qkv = torch.randn(T, (H + 2 * K) * D, generator=generator).to(device, dtype)
        arena = torch.full((2, K, S, D), 7.0, dtype=dtype, device=device)
        first = torch.tensor([position], device=device)
        q = rotate(qkv, tuple(norms), tables, first, arena, H, 1e-6)
        heads = qkv.double().view(T, -1, D)
        qk, v = heads[:, : H + K], heads[:, H + K :]
        if norm:
            weights = [w.double().expand(n, D) for w, n in zip(norms, (H, K), strict=True)]
            qk = torch.nn.functional.rms_norm(qk, (D,), eps=1e-6) * torch.cat(weights)
        cos, sin = (table[position : position + T].double() for table in tables)
        qk = qk * cos + qk.roll(D // 2, -1) * sin
        wanted = torch.full_like(arena, 7.0).double()
        wanted[0, :, position : position + T] = qk[:, H:].transpose(0, 1)
        wanted[1, :, position : position + T] = v.transpose(0, 1)
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(q.double(), qk[:, :H], atol=limit, rtol=limit)
        torch.testing.assert_close(arena.double(), wanted, atol=limit, rtol=limit)


def rows(device: str, T: int, W: int, dtype: torch.dtype) -> None:
    """Sum and norm, and the gate, against float64."""
    from cpmcu import triton_rows

    generator = torch.Generator().manual_seed(W)
    x, y = torch.randn(2, T, W, generator=generator).to(device, dtype)
    weight = torch.rand(W, generator=generator).to(device, dtype)
    gate_up = 3 * torch.randn(T, 2 * W, generator=generator).to(device, dtype)
    total, normed = triton_rows.add_norm(x, y, weight, alpha=0.7, eps=1e-5)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    near = {"atol": limit, "rtol": limit}
    torch.testing.assert_close(total.double(), x.double() + 0.7 * y.double(), **near)
    norm = torch.nn.functional.rms_norm(total.double(), (W,), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), norm, **near)
    gate, up = gate_up.double().chunk(2, 1)
    out = triton_rows.gated(gate_up)
    torch.testing.assert_close(out.double(), torch.nn.functional.silu(gate) * up, **near)


def compression(device: str, K: int, D: int, dtype: torch.dtype) -> None:
    """Token by token the bits of infllm2's compression of the whole."""
    from cpmcu import triton_compress
    from infllm2 import InfLLMv2Config
    from infllm2.compression import compress_keys

    S = 101
    k = torch.randn(K, S, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    config = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=16, window_size=32)
    wanted = compress_keys(k[None], config)
    got = [torch.full_like(x[0], float("nan")) for x in wanted]
    for position in range(S):
        triton_compress.compress(k, *got, torch.tensor([position], device=device), SMALL)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs[0])


# --- the engine


def engine(folder: Path, backend: str, **options: Any) -> Engine:
    return Engine.from_pretrained(folder, backend=backend, **options)


@contextlib.contextmanager
def large_tiles(device: str) -> Iterator[None]:
    """Few programs: in the interpreter each takes its time."""
    from cpmcu import triton_decode, triton_linear, triton_rotate

    changes = [
        *((triton_linear, name, 512) for name in ("ROWS", "TILE_ROWS")),
        *((triton_linear, name, 32) for name in ("BYTES", "TILE_COLUMNS")),
        *((triton_linear, name, 1) for name in ("PROGRAMS", "VECTOR_PROGRAMS")),
        (triton_decode, "PROGRAMS", 1),
        (triton_rotate, "TOKENS", 128),
    ]
    if importlib.util.find_spec("infllm2") is not None:
        from infllm2.backends import triton_launch

        changes.append((triton_launch, "PROGRAMS", 2))
    with contextlib.ExitStack() as stack:
        for module, name, value in changes if device == "cpu" else ():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def logits_equal_the_reference(
    device: str, folder: Path, dtype: str, quant: str, limit: float, **options: Any
) -> None:
    """Whole prompts, chunks, single tokens, after a rollback: the same weights in float32."""
    with large_tiles(device):
        _logits_equal(device, folder, dtype, quant, limit, options)


def _logits_equal(
    device: str, folder: Path, dtype: str, quant: str, limit: float, options: dict[str, Any]
) -> None:
    ours = engine(folder, "gpu", dtype=dtype, quant=quant, **options)
    assert ours.backend == "gpu" and ours._decoder.device.type == device
    wanted = truth(folder, dtype, quant, options)
    ids = ids_of(31)
    rows = wanted.logits(ids)
    scale = float(rows.abs().max())

    def near(got: torch.Tensor, at: int) -> None:
        error = float((got - rows[at]).abs().max())
        assert got.dtype == torch.float32 and error < limit * scale, (at, error / scale)

    whole = ours.logits(ids)
    assert whole.shape == rows.shape and (whole - rows).abs().max() < limit * scale
    ours.rollback(7)
    near(ours.prefill(ids[7:28]), 27)
    ours.prefill(ids_of(9, seed=9))
    ours.rollback(28)
    near(ours.decode(ids[28]), 28)
    near(ours.decode(ids[29]), 29)


def truth(folder: Path, dtype: str, quant: str, options: dict[str, Any]) -> Engine:
    """The reference in float32, its weights the numbers that `quant` holds."""
    from cpmcu import reference
    from cpmcu.loader import Source
    from cpmcu.rounding import rounded
    from cpmcu.tensors import load

    plain = engine(folder, "reference", dtype="float32", **options)
    source = Source(folder)
    weights = load(source, getattr(torch, dtype))

    def held(weight: torch.Tensor, kind: str) -> torch.Tensor:
        return rounded(weight, kind)

    outer = "int8" if quant in ("int4", "ternary") else quant
    weights.layers = [
        layer.mapped(lambda w: held(w, quant), lambda x: x.float()) for layer in weights.layers
    ]
    weights.embedding = held(weights.embedding, outer)
    weights.head = weights.embedding if source.spec.tie else held(weights.head, outer)
    weights.norm = weights.norm.float()
    plain._decoder.weights = weights
    assert isinstance(plain._decoder, reference.Decoder)
    return plain


def sparse_equals_the_reference(device: str, folder: Path, dtype: str, limit: float) -> None:
    """Dense tokens, then sparse ones, in chunks and one by one, and after a rollback."""
    with large_tiles(device):
        ours = engine(folder, "gpu", dtype=dtype, sparse=SMALL)
        ids = ids_of(124)
        rows = engine(folder, "reference", dtype="float32", sparse=SMALL).logits(ids)
        dense = engine(folder, "reference", dtype="float32", sparse="off").logits(ids)
        scale = float(rows.abs().max())
        assert (rows - dense).abs().max() > 2 * limit * scale
        got = [ours.prefill(ids[:97])]
        got += [ours.decode(i) for i in ids[97:101]]  # the switch is among them
        got.append(ours.prefill(ids[101:118]))
        ours.prefill(ids_of(9, seed=9))
        ours.rollback(107)
        got.append(ours.prefill(ids[107:121]))
        got += [ours.decode(i) for i in ids[121:]]
        at = [96, *range(97, 101), 117, 120, *range(121, 124)]
        assert (torch.stack(got) - rows[at]).abs().max() < limit * scale
        assert sum(len(steps) for _, steps in ours._decoder._steps.values()) == 2


def a_recorded_step_is_right_everywhere(device: str, folder: Path, sparse: bool) -> None:
    """Recorded at one token and position, replayed at others: on a GPU as the engine does it, in
    the interpreter by `gpu_recording`.
    """
    with large_tiles(device), torch.inference_mode():
        options = {"dtype": "float32", "quant": "auto" if sparse else "int8"}
        options["sparse"] = SMALL if sparse else "off"
        ours, other = (engine(folder, "gpu", **options) for _ in range(2))
        ids = ids_of(114)
        ours.prefill(ids[:109])
        decoder, cache = ours._decoder, ours._cache
        cache.reserve(114)
        step = decoder._step(cache, sparse=sparse, long=False)
        replay = step if device == "cuda" else recorded(step, ids[3], 40)
        found = [replay(ids[at], at)[0].to("cpu", copy=True) for at in (*range(109, 114), 110)]
        other.prefill(ids[:109])
        wanted = [other.decode(i) for i in ids[109:]]
        for got, expected in zip(found, [*wanted, wanted[1]], strict=True):
            assert torch.equal(got, expected)
        assert decoder._step(cache, sparse=sparse, long=False) is step
        cache.reserve(5000 if device == "cuda" else 400)
        assert decoder._step(cache, sparse=sparse, long=False) is not step
        assert (step.reason == "") == (device == "cuda")


def recorded(step: Any, token: int, position: int) -> Callable[[int, int], torch.Tensor]:
    """The step as a graph of it would run; what it wrote at `position` is put back."""
    from gpu_recording import Recording

    memory = [x for x in step.compute.args[1].memory() if x.numel()]
    before = [x.clone() for x in memory]
    step.token.fill_(token), step.position.fill_(position)
    recording = Recording(lambda: step.compute(step.token, step.position))
    for x, old in zip(memory, before, strict=True):
        x.copy_(old)

    def replay(token: int, position: int) -> torch.Tensor:
        step.token.fill_(token), step.position.fill_(position)
        return recording.replay()

    return replay


def sessions_are_apart_and_go_on_from_disk(device: str, folder: Path, target: Path) -> None:
    """Two sessions take turns; a file of one is the other's, and the native backend's."""
    from cpmcu import cpu_library

    with large_tiles(device):
        made = engine(folder, "gpu", dtype="float32", sparse=SMALL)
        ids = ids_of(108)
        made.prefill(ids[:105])
        made.save(target)
        if cpu_library.kernels()[0] is not None:
            native = engine(folder, "cpu", dtype="float32", sparse=SMALL)
            native.restore(target)
            near = native.decode(ids[105])
        wanted = [made.decode(i) for i in ids[105:]]
        if cpu_library.kernels()[0] is not None:
            assert (near - wanted[0]).abs().max() < 1e-4 * near.abs().max()
        other = made.session()
        other.prefill(ids[50:90])
        made.rollback(106)
        for i, expected in zip(ids[106:], wanted[1:], strict=True):
            other.decode(i)
            assert torch.equal(made.decode(i), expected)
        other.restore(target)
        assert other.tokens == ids[:105]
        assert torch.equal(other.decode(ids[105]), wanted[0])
        made.reset()
        text = made.generate(token_ids=ids[:60], max_new_tokens=3)
        plain = engine(folder, "reference", dtype="float32").generate(
            token_ids=ids[:60], max_new_tokens=3
        )
        assert text.token_ids == plain.token_ids


def ternary_equals_the_reference(device: str, folder: Path) -> None:
    """Weights that are ternary, exactly; what is not, and embedding and head, in 8 bits."""
    from cpmcu.gpu_weights import IntWeights, TernaryWeights

    with large_tiles(device):
        ours = engine(folder, "gpu", dtype="float32", quant="ternary")
        layers = ours._decoder.weights.layers
        assert isinstance(layers[0].down, TernaryWeights)
        assert isinstance(ours._decoder.weights.head, IntWeights)
        ids = ids_of(31)
        rows = engine(folder, "reference", dtype="float32").logits(ids)
        got = [ours.prefill(ids[:28]), *(ours.decode(i) for i in ids[28:])]
        assert (torch.stack(got) - rows[27:]).abs().max() < 3e-2 * rows.abs().max()


def selfcheck_passes(device: str) -> None:
    """Its lines on the GPU are there and good; in the interpreter one of them."""
    from cpmcu import selfcheck

    kinds = selfcheck.TOLERANCE if device == "cuda" else {"bfloat16": 5e-2}
    with large_tiles(device), mock.patch.object(selfcheck, "TOLERANCE", kinds):
        checks = [check for check in selfcheck.run() if check.backend == "gpu"]
    assert [check.dtype for check in checks] == [*kinds]
    assert all(check.available and check.passed for check in checks), checks


def takes_what_is_planned(device: str, folder: Path, quant: str, made: Any) -> None:
    """Bytes of weights, keys and values."""
    ours = engine(folder, "gpu", dtype="bfloat16", quant=quant, max_context=700)
    with torch.inference_mode():
        ours._cache.reserve(700)
    vectors = 2 * ours.spec.hidden * (1 + 2 * ours.spec.layers)  # in bfloat16 whatever `quant`
    bits = {"bfloat16": 16, "int8": 8.5, "int4": 4.5}[quant]
    planned = made.weight_bytes + vectors * (1 - bits / 16)
    assert ours._decoder.weights.nbytes == pytest.approx(planned, abs=1)
    assert ours._cache.nbytes == made.kv_bytes
