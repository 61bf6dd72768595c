"""The native backend: layouts and products against plain PyTorch, every level, any threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from cpmcu import Engine
from cpmcu import cpu_library as c
from cpmcu.cpu_weights import KINDS, pack
from cpmcu.rounding import rounded

pytestmark = pytest.mark.skipif(c.kernels()[0] is None, reason="the CPU kernels were not built")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pool():
    made = c.Pool(2)
    yield made
    made.close()


def step_of(tokens):
    step = c.Step()
    step.tokens, step.every = tokens, 1
    return step


def table_rows(matrix, ids, pool):
    """Rows of a packed matrix, by the embedding."""
    step, x = step_of(len(ids)), torch.empty(len(ids), matrix.struct.cols)
    step.ids = ids.data_ptr()
    args = c.EmbedArgs(ctypes.addressof(step), matrix.struct, x.data_ptr(), 1.0, 0)
    pool.run(c.Records([("embed", args)]))
    return x


def product(matrix, x, pool, *, bias=None, out=None, alpha=1.0):
    """Normalise rows of x by 1 / RMS, multiply: the way every product of the engine goes."""
    m, tokens = matrix.struct, len(x)
    integers = m.kind in (c.INT8, c.INT4)
    blocks = -(-tokens // 48) * 48
    groups = m.cols // m.group if integers else 0
    data = torch.zeros(blocks * m.cols * 4, dtype=torch.uint8)
    room = torch.zeros(3, blocks * max(1, groups)).int()  # scales, offsets, zeros
    packed = c.Packed(data.data_ptr(), *(row.data_ptr() for row in room), m.cols, m.kind, m.group)
    step, ones = step_of(tokens), torch.ones(m.cols)
    at = ctypes.addressof(step)
    result = torch.full((tokens, m.rows), float("nan")) if out is None else out
    size = c.loaded().size("multiply_work", m)
    work = torch.empty(2 * size, dtype=torch.uint8)
    norm = c.NormArgs(at, x.data_ptr(), ones.data_ptr(), packed, 0.0, 1.0, 0, 0)
    multiply = c.MultiplyArgs(
        at, m, packed, result.data_ptr(), c.address(bias), work.data_ptr(), size, alpha,
        out is not None, 0, 0, c.Packed(),
    )  # fmt: skip
    pool.run(c.Records([("norm", norm), ("multiply", multiply)]))
    return result


def in_tiles(quant, tokens):
    """Whether the kernels multiply by matrix tiles, in bfloat16."""
    return c.kernels()[0].level == "amx" and tokens > 16 and quant != "float32"


def activations(x, quant):
    """What the kernels multiply: rows over their RMS, rounded as their kind wants."""
    tokens, x = len(x), x / x.square().mean(1, keepdim=True).sqrt()
    if quant == "float32":
        return x.double()
    if quant == "bfloat16" or in_tiles(quant, tokens):
        return x.bfloat16().double()
    parts = x.unflatten(1, (-1, 32))
    # From the least to the largest, 0 among them.
    scale = (parts.amax(2, keepdim=True).relu() + (-parts).amax(2, keepdim=True).relu()) / 254
    codes = torch.where(scale == 0, 0.0, parts / scale).round()
    return (codes.double() * scale.double()).flatten(1)


@pytest.mark.parametrize("quant", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (16, 64), (50, 96), (130, 160), (33, 416)])
def test_layouts_hold_the_rounded_weights(quant, rows, cols, pool):
    weight = torch.randn(rows, cols)
    weight[0, :32] = 0.0  # a group of zeros
    weight[-1] *= 1e-6  # scales below the smallest normal half
    for source in (weight, weight.bfloat16()):
        ids = torch.randperm(rows)
        got = table_rows(pack(source, KINDS[quant], pool), ids, pool)
        wanted = rounded(source.bfloat16() if quant == "bfloat16" else source, quant)
        assert torch.equal(got, wanted[ids])


@pytest.mark.parametrize("quant", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 7, 12, 13, 29, 100])
def test_products_equal_float64(quant, tokens, pool):
    rows, cols = 83, 288
    weight, x, bias = torch.randn(rows, cols), torch.randn(tokens, cols), torch.randn(rows)
    x[0, :128] = 0.0
    matrix = pack(weight, KINDS[quant], pool)
    exact = rounded(weight.bfloat16() if quant == "bfloat16" else weight, quant)
    exact = (exact.bfloat16() if in_tiles(quant, tokens) else exact).double()
    truth = activations(x, quant) @ exact.T
    # A code of an activation may differ where a value lies between two to the last bit.
    limit = 2e-6 if quant == "float32" else 2e-3
    error = limit * truth.abs().max()
    assert (product(matrix, x, pool, bias=bias) - (truth + bias)).abs().max() < error
    before = torch.randn(tokens, rows)
    added = product(matrix, x, pool, out=before.clone(), alpha=0.5)
    assert (added - (before + 0.5 * truth)).abs().max() < error
    # And no token's result depends on the others, but for whether there are enough for tiles.
    whole, some = product(matrix, x, pool), 17 if in_tiles(quant, tokens) else 1
    for i in range(tokens - some + 1):
        assert torch.equal(product(matrix, x[i : i + some].clone(), pool)[0], whole[i])


@pytest.mark.parametrize("quant", ["bfloat16", "int8", "int4"])
def test_products_of_many_columns(quant, pool):
    """Tiles sum a thousand columns at a time."""
    rows, cols, tokens = 35, 2336, 40
    weight, x, bias = torch.randn(rows, cols), torch.randn(tokens, cols), torch.randn(rows)
    exact = rounded(weight.bfloat16() if quant == "bfloat16" else weight, quant)
    exact = (exact.bfloat16() if in_tiles(quant, tokens) else exact).double()
    truth = activations(x, quant) @ exact.T + bias
    got = product(pack(weight, KINDS[quant], pool), x, pool, bias=bias)
    assert (got - truth).abs().max() < 2e-3 * truth.abs().max()


@pytest.mark.parametrize("quant", KINDS)
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(("cols", "ffn"), [(96, 64), (4640, 32), (96, 48)])
def test_gates_beside_the_product_are_gates_after_it(quant, tokens, cols, ffn, pool):
    weight, x = torch.randn(2 * ffn, cols) / cols**0.5, torch.randn(tokens, cols)
    kind = KINDS[quant] if ffn % 32 == 0 else c.FLOAT32 if quant == "float32" else c.BFLOAT16
    group = 32 if kind in (c.INT8, c.INT4) else 0
    matrix, plain = pack(weight, KINDS[quant], pool), pack(weight, c.FLOAT32, pool)
    step, ones = step_of(tokens), torch.ones(cols)
    at, kept, results = ctypes.addressof(step), [], []

    def rows_for(width, kind, group):
        room = [torch.zeros(48 * width * 4, dtype=torch.uint8)]
        room += [torch.zeros(48 * width), *torch.zeros(2, 48 * width).int()]
        kept.append(room)
        return room[0], c.Packed(*(t.data_ptr() for t in room), width, kind, group)

    size = c.loaded().size("multiply_work", matrix.struct)
    work, out = torch.empty(2 * size, dtype=torch.uint8), torch.empty(tokens, 2 * ffn)
    _, packed = rows_for(cols, matrix.struct.kind, matrix.struct.group)
    for beside in (True, False):
        data, to = rows_for(ffn, kind, group)
        gated = to if beside else c.Packed()
        of = matrix.struct if beside else plain.struct  # float32: never in tiles
        pool.run(c.Records([
            ("norm", c.NormArgs(at, x.data_ptr(), ones.data_ptr(), packed, 0.0, 1.0, 0, 0)),
            ("multiply", c.MultiplyArgs(at, matrix.struct, packed, out.data_ptr(), None,
                                        work.data_ptr(), size, 1.0, 0, 0, 0, gated)),
            ("swiglu", c.SwigluArgs(at, out.data_ptr(), to, of)),
        ]))  # fmt: skip
        results.append(data)
    beside, after = results
    assert after.any()
    if in_tiles(quant, tokens) and ffn % 32 == 0:  # sums of columns in other orders
        a, b = beside.view(torch.bfloat16).float(), after.view(torch.bfloat16).float()
        assert (a - b).abs().max() < 2e-2 * b.abs().max()
    else:
        assert torch.equal(beside, after)


def test_integer_sums_do_not_overflow(pool):
    """All codes at their ends, over many columns."""
    cols = 4096
    for quant, value in (("int8", 127.0), ("int4", -8.0)):
        matrix = pack(torch.full((16, cols), value), KINDS[quant], pool)
        got = product(matrix, torch.ones(2, cols), pool)
        torch.testing.assert_close(got, torch.full((2, 16), value * cols), rtol=1e-6, atol=0)


def test_what_is_not_finite_reaches_the_logits(pool):
    for quant in KINDS:
        matrix = pack(torch.randn(16, 64), KINDS[quant], pool)
        for odd in (float("nan"), float("inf")):
            x = torch.randn(3, 64)
            x[1, 5] = odd
            got = product(matrix, x, pool)
            assert not got[1].isfinite().any()
            assert got[0].isfinite().all() and got[2].isfinite().all()


@pytest.mark.parametrize("quant", KINDS)
def test_same_bits_for_any_threads(tiny_folder, quant, monkeypatch):
    monkeypatch.setattr("cpmcu.threads.cores", lambda: 8)
    _, folder = tiny_folder("llama-gqa3")
    dtype = "float32" if quant == "float32" else "bfloat16"
    ids = torch.randint(256, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = []
    first = 40 if in_tiles(quant, len(ids)) else 7  # chunks too short for tiles have other bits
    for threads in (1, 2, 3):
        engine = Engine.from_pretrained(
            folder, dtype=dtype, quant=quant, backend="cpu", threads=threads
        )
        whole = engine.logits(ids)
        engine.reset()
        got = [engine.prefill(ids[:first]), engine.prefill(ids[first:570])]
        got += [engine.decode(i) for i in ids[570:]]
        runs.append((whole, torch.stack(got)))
    for whole, parts in runs[1:]:
        assert torch.equal(whole, runs[0][0]) and torch.equal(parts, runs[0][1])
    # Chunks are the whole's bits; a single token's keys are summed in parts, and then merged.
    whole, parts = runs[0]
    assert torch.equal(parts[:2], whole[[first - 1, 569]])
    limit = {"float32": 1e-5, "bfloat16": 2e-2}.get(quant, 5e-2) * whole.abs().max()
    assert (parts[2:] - whole[570:]).abs().max() < limit
    engine.reset()
    short = torch.stack([engine.prefill(ids[:7]), engine.prefill(ids[7:20])])  # too few for tiles
    assert (short - whole[[6, 19]]).abs().max() < limit


def test_rollback_and_a_cache_that_moves(tiny_folder):
    _, folder = tiny_folder("qwen3")
    engine = Engine.from_pretrained(folder, dtype="bfloat16", quant="int8", backend="cpu")
    ids = torch.randint(256, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = engine.logits(ids)
    engine.reset()
    engine.prefill(ids[:300])
    engine.prefill([5] * 400)  # the cache grows twice
    engine.rollback(290)
    assert torch.equal(engine.prefill(ids[290:]), wanted[-1])


def test_pools_sleep_and_end():
    pools = [c.Pool(2) for _ in range(8)]
    step, x = step_of(0), torch.empty(1)
    args = c.NormArgs(
        ctypes.addressof(step), x.data_ptr(), x.data_ptr(), c.Packed(), 0.0, 1.0, 0, 0
    )
    for pool in pools:
        for _ in range(50):
            pool.run(c.Records([("norm", args)] * 5))
        pool.close()
        pool.close()


def test_an_error_of_an_operation_is_raised(pool):
    with pytest.raises(RuntimeError, match="an operation failed with code 1"):
        matrix = c.Matrix(None, None, None, 16, 32, 9, 32)
        pool.run(c.Records([("lay_out", c.LayOutArgs(None, 32, matrix, 0, 0))]))


def test_columns_that_do_not_fit_are_refused(tiny_folder, pool):
    with pytest.raises(ValueError, match=r"a multiple of 32 columns, got \(16, 40\)"):
        pack(torch.randn(16, 40), c.INT4, pool)
    with pytest.raises(ValueError, match="a multiple of 2 columns"):
        pack(torch.randn(16, 41), c.BFLOAT16, pool)
    _, folder = tiny_folder("llama")
    with pytest.raises(ValueError, match="quant must be one of auto, float32"):
        Engine.from_pretrained(folder, quant="int3")
    with pytest.raises(ValueError, match="it has no int8 weights"):
        Engine.from_pretrained(folder, quant="int8", backend="reference")


LEVEL = """
import sys, torch
from cpmcu import cpu_library, selfcheck
assert cpu_library.kernels()[0].level == sys.argv[1], cpu_library.kernels()[0].level
checks = [check for check in selfcheck.run() if check.backend == "cpu"]
assert checks and all(check.passed and check.available for check in checks), checks
engine = selfcheck.tiny_engine(torch.bfloat16, quant="int4", backend="cpu")
print(engine.logits(list(range(60))).argmax(1).tolist())
"""


@pytest.mark.parametrize("level", c.LEVELS)
def test_every_level(level):
    best = c.LEVELS.index(c.kernels()[0].level)
    if c.LEVELS.index(level) > best:
        pytest.skip(f"this processor has {c.LEVELS[best]} at most")
    env = os.environ | {"CPMCU_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LEVEL, level], env=env, check=True, timeout=300)


def test_an_unknown_level_is_named():
    code = "from cpmcu import cpu_library; print(cpu_library.kernels()[1])"
    env = os.environ | {"CPMCU_CPU_LEVEL": "sse9"}
    said = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert "CPMCU_CPU_LEVEL must be one of scalar, avx2" in said
