from __future__ import annotations

from dataclasses import replace

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import SCORERS, LocretConfig, generate, locret, prefill  # noqa: E402
from locret.quantised import decode, encode, entry_bytes, group_of  # noqa: E402

SMALL = LocretConfig(budget=16, chunk=8, stabilisers=4, local=5, sinks=2)


def numbers(width: int) -> torch.Tensor:
    """Entries of very different sizes, some constant, some far from zero."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 3, 50, width, generator=generator) * torch.logspace(-3, 3, 50)[:, None]
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = 0, -3.7, 1000 + x[0, 0, 2]
    return x


def test_int8_is_within_half_a_scale_and_stays_what_it_is() -> None:
    x = numbers(16)
    codes, scales = encode(x, "int8")
    back = decode((codes, scales), "int8", torch.float32)
    assert ((back - x).abs() <= scales * 0.5001).all()
    assert codes.abs().amax(-1).flatten()[1:].eq(127).all() and not back[0, 0, 0].any()
    again, same = encode(back, "int8")
    assert torch.equal(again, codes) and torch.allclose(same, scales)


@pytest.mark.parametrize("width", [2, 6, 16, 64, 80, 96, 128])
def test_int4_is_within_half_a_fifteenth_of_its_group(width: int) -> None:
    x = numbers(width)
    planes = encode(x, "int4")
    back = decode(planes, "int4", torch.float32)
    groups = x.unflatten(-1, (-1, group_of(width)))
    low, high = groups.amin(-1), groups.amax(-1)
    # Scale and offset are rounded outwards to bfloat16, 1/128 of themselves at most.
    steps = ((high - low + low.abs() / 128) / 15) * (1 + 1 / 128)
    error = (back - x).abs().unflatten(-1, (-1, group_of(width))).amax(-1)
    assert (error <= 0.5001 * steps + 1e-6 * groups.abs().amax(-1)).all()
    assert not back[0, 0, 0].any() and (back[0, 0, 1] + 3.7).abs().max() < 3.7 / 100
    assert planes[0].dtype == torch.uint8 and planes[0].shape[-1] == width // 2
    with pytest.raises(ValueError, match="even head size, got 5"):
        encode(torch.ones(5), "int4")


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_closed_form(storage: str, dtype: torch.dtype) -> None:
    for width in (16, 64, 80):
        planes = encode(torch.randn(7, width).to(dtype), storage)
        assert sum(p.nbytes for p in planes) == 7 * entry_bytes(storage, width, dtype.itemsize)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama-gqa3", "qwen3", "phi3"])
@pytest.mark.parametrize(("storage", "bound"), [("int8", 0.1), ("int4", 1.0)])
def test_with_room_for_all_it_is_nearly_the_model(arch: str, storage: str, bound: float) -> None:
    model = testbed.tiny(arch)
    ids = torch.randint(5, 250, (2, 37), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits
    config = LocretConfig(budget=40, chunk=16, stabilisers=3, local=4, storage=storage)
    with locret(model, "keynorm", config):
        out = model(input_ids=ids).logits
    gap = (out - dense).abs().max()
    assert 0 < gap < bound * dense.std()


@torch.no_grad()
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(("storage", "left"), [("int8", 16 + 4), ("int4", 8 + 4)])
def test_it_holds_less_and_goes_on(scorer: str, storage: str, left: int) -> None:
    model = testbed.tiny("llama-gqa3")
    ids = torch.randint(5, 250, (1, 60), generator=torch.Generator().manual_seed(1))
    config = replace(SMALL, storage=storage)
    cache, exact = prefill(model, scorer, ids, config), prefill(model, scorer, ids, SMALL)
    assert cache.peak == exact.peak
    assert cache.kv_bytes() / exact.kv_bytes() == left / 64  # of 16 numbers of float32
    options = {"max_new_tokens": 30, "do_sample": False, "cache": cache}
    found = generate(model, scorer, ids[:, :3], config, **options)
    assert torch.equal(found, generate(model, scorer, ids[:, :3], config, **options))
    with pytest.raises(ValueError, match='storage must be one of "model", "int8", "int4"'):
        replace(SMALL, storage="int2")


@torch.no_grad()
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_renumbering_does_not_wear_what_is_coded(storage: str) -> None:
    """Layer 0: after many evictions a key is its first coding, turned, not a copy of copies."""
    model = testbed.tiny("llama-gqa3")
    ids = torch.randint(5, 250, (1, 160), generator=torch.Generator().manual_seed(2))
    config = LocretConfig(budget=16, chunk=8, stabilisers=2, local=0, storage=storage)
    layer = prefill(model, "random", ids, config).layers[0]
    exact = prefill(model, "random", ids, replace(config, storage="model")).layers[0]
    assert torch.equal(layer.positions, exact.positions) and layer.turns.abs().max() > 16
    share = {"int8": 4 / 127, "int4": 4 / 15}[storage]  # √16 numbers, each off by half a step
    for kind in ("key", "value"):
        right = exact.all(kind)
        assert ((layer.all(kind) - right).norm(dim=-1) <= share * right.norm(dim=-1)).all()
