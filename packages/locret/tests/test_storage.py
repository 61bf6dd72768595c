from __future__ import annotations

from dataclasses import replace

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import SCORERS, LocretConfig, generate, locret, prefill  # noqa: E402
from locret.quantised import dequantise, quantise  # noqa: E402

SMALL = LocretConfig(budget=16, chunk=8, stabilisers=4, local=5, sinks=2, storage="int8")


def test_codes_are_within_half_a_scale_and_stay_what_they_are() -> None:
    x = torch.randn(2, 3, 50, 16) * torch.logspace(-3, 3, 50)[:, None]
    x[0, 0, 0] = 0
    codes, scales = quantise(x)
    back = dequantise(codes, scales, torch.float32)
    assert ((back - x).abs() <= scales * 0.5001).all()
    assert codes.abs().amax(-1).flatten()[1:].eq(127).all() and not back[0, 0, 0].any()
    again, same = quantise(back)
    assert torch.equal(again, codes) and torch.allclose(same, scales)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama-gqa3", "qwen3", "phi3"])
def test_with_room_for_all_it_is_nearly_the_model(arch: str) -> None:
    model = testbed.tiny(arch)
    ids = torch.randint(5, 250, (2, 37), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits
    config = LocretConfig(budget=40, chunk=16, stabilisers=3, local=4, storage="int8")
    with locret(model, "keynorm", config):
        out = model(input_ids=ids).logits
    gap = (out - dense).abs().max()
    assert 0 < gap < 0.1 * dense.std()


@torch.no_grad()
@pytest.mark.parametrize("scorer", SCORERS)
def test_it_holds_a_third_and_goes_on(scorer: str) -> None:
    model = testbed.tiny("llama-gqa3")
    ids = torch.randint(5, 250, (1, 60), generator=torch.Generator().manual_seed(1))
    cache = prefill(model, scorer, ids, SMALL)
    exact = prefill(model, scorer, ids, replace(SMALL, storage="model"))
    assert cache.layers[0].keys.dtype == torch.int8 and cache.peak == exact.peak
    assert cache.kv_bytes() / exact.kv_bytes() == (16 + 4) / 64  # codes and a scale for float32
    options = {"max_new_tokens": 30, "do_sample": False, "cache": cache}
    found = generate(model, scorer, ids[:, :3], SMALL, **options)
    assert torch.equal(found, generate(model, scorer, ids[:, :3], SMALL, **options))
    with pytest.raises(ValueError, match='storage must be "model" or "int8"'):
        replace(SMALL, storage="int2")
