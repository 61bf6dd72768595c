"""Keys and values in eight bits: rows by themselves, native code against the reference, sessions;
and decoding with few heads to a key, in every head size that its kernel has.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cpmcu import Engine, SparseAttention, plan
from cpmcu import cpu_library as c
from cpmcu.int8_rows import from_rows, to_rows
from cpmcu.weights import allocate

native = pytest.mark.skipif(c.kernels()[0] is None, reason="the CPU kernels were not built")

SMALL = SparseAttention(
    kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=3,
    dense_len=100,
)  # fmt: skip
IDS = torch.randint(256, (300,), generator=torch.Generator().manual_seed(5)).tolist()


def test_rows_hold_numbers_to_half_a_step():
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0.0
    x[1] *= 1e-30
    rows = to_rows(x)
    assert rows.shape == (3, 5, 44) and rows.dtype == torch.int8
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((from_rows(rows, torch.float32) - x).abs() <= 0.5001 * step).all()
    for odd in (torch.nan, torch.inf, -torch.inf):
        x[2, 1, 7] = odd
        back = from_rows(to_rows(x), torch.float32)
        assert back[2, 1].isnan().all() and back[2, 0].isfinite().all()


def pair(folder, **options):
    """The native engine and the reference."""
    return [
        Engine.from_pretrained(folder, backend=backend, **options)
        for backend in ("cpu", "reference")
    ]


@native
@pytest.mark.parametrize("arch", ["llama", "llama-gqa3", "llama-mqa", "qwen3"])
@pytest.mark.parametrize("sparse", ["off", SMALL], ids=["dense", "sparse"])
def test_native_equals_the_reference(tiny_folder, arch, sparse):
    _, folder = tiny_folder(arch)
    ours, plain = pair(folder, dtype="float32", kv="int8", sparse=sparse)
    exact = Engine.from_pretrained(folder, dtype="float32", backend="reference", sparse=sparse)
    wanted = plain.logits(IDS)
    moved = (exact.logits(IDS) - wanted).norm()
    assert moved > 0
    # But for a number here and there that lies between two codes to the last bit.
    assert (ours.logits(IDS) - wanted).norm() < 0.3 * moved
    ours.reset()
    got = [ours.prefill(IDS[:37]), ours.prefill(IDS[37:250])]
    got += [ours.decode(token) for token in IDS[250:]]
    rows = [36, 249, *range(250, 300)]
    assert (torch.stack(got) - wanted[rows]).norm() < 0.3 * moved
    a, b = (torch.as_tensor(e._cache.layers[0])[:, :, :300] for e in (ours, plain))
    codes, wanted_codes = a[..., :-4].int(), b[..., :-4].int()
    assert (codes - wanted_codes).abs().max() <= 1
    assert (codes == wanted_codes).float().mean() > 0.999


@native
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_few_heads_decode_as_well_as_pytorch(tiny_folder, kv, head_dim, group):
    _, folder = tiny_folder("qwen3")
    spec = Engine.from_pretrained(folder, backend="reference").spec
    spec = dataclasses.replace(spec, head_dim=head_dim, heads=2 * group, kv_heads=2)

    def engine(dtype, backend):
        weights = allocate(spec, dtype)
        generator = torch.Generator().manual_seed(group)
        for name, slot in weights.slots.items():
            drawn = torch.randn(slot.shape, generator=generator)
            slot.copy_(1 + 0.1 * drawn if "norm" in name else 0.15 * drawn)
        return Engine(spec, weights, backend=backend, kv=kv, max_context=512)

    def decoded(made):
        made.prefill(IDS[:20])
        return torch.stack([made.decode(token) for token in IDS[20:150]])

    exact = decoded(engine(torch.float32, "reference"))
    theirs = decoded(engine(torch.bfloat16, "reference")) - exact
    ours = decoded(engine(torch.bfloat16, "cpu")) - exact
    assert ours.norm() < 2 * theirs.norm()


def test_sessions_keep_their_kind(tiny_folder, tmp_path):
    _, folder = tiny_folder("llama")
    first = Engine.from_pretrained(folder, kv="int8")
    first.prefill(IDS[:50])
    first.save(tmp_path / "session")
    second = Engine.from_pretrained(folder, kv="int8").session()
    second.restore(tmp_path / "session")
    assert torch.equal(second.decode(7), first.decode(7))
    with pytest.raises(ValueError, match="saved with another model"):
        Engine.from_pretrained(folder).restore(tmp_path / "session")


def test_the_plan_counts_the_bytes(tiny_folder):
    _, folder = tiny_folder("llama")
    engine = Engine.from_pretrained(folder, kv="int8", max_context=256)
    engine.prefill(IDS[:256])
    made = plan.make(folder, kv="int8", context=256, bandwidth=1e9)
    assert made.kv == "int8" and made.kv_bytes == engine._cache.nbytes
    assert made.kv_bytes < plan.make(folder, context=256, bandwidth=1e9).kv_bytes
    with pytest.raises(ValueError, match="kv must be 'auto' or 'int8', got 'int4'"):
        Engine.from_pretrained(folder, kv="int4")
