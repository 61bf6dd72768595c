"""The prepared decoding step: the same bits as the long way, and never where it does not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infllm2 import InfLLMv2Config, LayerCache, SparseCache, infllmv2_attention
from infllm2.backends.cpu_decode import DecodeStep
from infllm2.backends.cpu_library import kernels

pytestmark = pytest.mark.skipif(kernels()[0] is None, reason="the CPU kernels were not built")

CONFIG = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=2, dense_len=-1
)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the caches after each prepared step that ran."""
    lengths: list[int] = []
    run = DecodeStep.run

    def counting(self: DecodeStep, store: LayerCache, *new: Tensor) -> Tensor:
        out = run(self, store, *new)
        lengths.append(store.length)
        return out

    monkeypatch.setattr(DecodeStep, "run", counting)
    return lengths


def tokens(n: int, B: int = 1, K: int = 2, G: int = 3, D: int = 8, dtype=torch.float32):
    return tuple(torch.randn(B, h, n, D).to(dtype) for h in (K * G, K, K))


def last(x: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    return tuple(t[:, :, i : i + 1] for t in x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "K", "G"), [(1, 1, 16), (1, 2, 8), (2, 3, 1), (1, 8, 5)])
@pytest.mark.parametrize("dense_len", [-1, 180, 1 << 40])
def test_decoding_is_prefill_to_the_bit(
    dtype: torch.dtype, B: int, K: int, G: int, dense_len: int, threads: int, taken: list[int]
) -> None:
    """From the first token on, through every growth of the buffers and the switch to sparse."""
    config = replace(CONFIG, dense_len=dense_len)
    new = tokens(330, B, K, G, 16, dtype)
    cache = LayerCache(config)
    got = [infllmv2_attention(*last(new, i), config, cache=cache) for i in range(330)]
    wanted = LayerCache(config)
    for i in range(330):
        wanted.step = None  # the long way
        assert torch.equal(got[i], infllmv2_attention(*last(new, i), config, cache=wanted))
    assert len(taken) > 300, "the prepared step was hardly ever taken"
    assert torch.equal(cache.keys, new[1]) and torch.equal(cache.values, new[2])
    if dense_len < 330:
        ours, theirs = cache.compressed(), wanted.compressed()
        assert torch.equal(ours.fine, theirs.fine) and torch.equal(ours.coarse, theirs.coarse)


def test_rejected_tokens_are_taken_back(taken: list[int]) -> None:
    """Speculation: each draft of 7 tokens loses its last 0 … 7."""
    new = tokens(400)
    cache, kept = LayerCache(CONFIG), 100
    infllmv2_attention(*(x[:, :, :kept] for x in new), CONFIG, cache=cache)
    for rejected in list(range(8)) * 8:
        draft = [torch.randn_like(x[:, :, :7]) for x in new]
        for x, d in zip(new, draft, strict=True):
            x[:, :, kept : kept + 7] = d
        for i in range(7):
            got = infllmv2_attention(*last(new, kept + i), CONFIG, cache=cache)
            end = kept + i + 1
            whole = infllmv2_attention(
                new[0][:, :, end - 1 : end], *(x[:, :, :end] for x in new[1:]), CONFIG
            )
            assert torch.equal(got, whole)
        kept += 7 - rejected
        cache.crop(kept)
        if kept > 380:
            break
    assert len(taken) > 300


def test_other_inputs_take_the_long_way(taken: list[int]) -> None:
    new = tokens(300)
    cache = LayerCache(CONFIG)
    infllmv2_attention(*(x[:, :, :200] for x in new), CONFIG, cache=cache)

    def call(i: int, change=lambda q, k, v: (q, k, v), config=CONFIG, backend="auto") -> bool:
        """Is the result right; was the step taken?"""
        before = len(taken)
        q, k, v = last(new, i)
        got = infllmv2_attention(*change(q, k, v), config, cache=cache, backend=backend)
        whole = infllmv2_attention(
            q, new[1][:, :, : i + 1], new[2][:, :, : i + 1], config, backend=backend
        )
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)
        return len(taken) > before

    assert not call(200), "there was no step yet"
    assert call(201)
    assert not call(202, config=replace(CONFIG, lse="exact"))
    assert call(203, config=replace(CONFIG, lse="exact")), "an equal config is the same"
    assert not call(204) and call(205)
    assert not call(206, backend="reference")
    assert call(207)  # the reference left the step in place
    strided = torch.empty(1, 6, 1, 16)[..., ::2]
    assert call(208, lambda q, k, v: (strided.copy_(q), k, v))
    assert not call(209, lambda q, k, v: (q.clone().requires_grad_(), k, v))
    cache.reorder(torch.tensor([0]))
    assert not call(210) and call(211)
    with torch.inference_mode():
        assert call(212)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    assert not call(213) and call(214)
    torch.set_num_threads(threads)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="do not fit the cache"),
    ):
        infllmv2_attention(*last(new, 215), CONFIG, cache=cache)
    with pytest.raises(ValueError, match="do not fit the cache"):
        infllmv2_attention(*(x[:, :1] for x in last(new, 215)), CONFIG, cache=cache)
    assert cache.length == 215
    cache.reset()
    assert cache.step is None


def test_copies_go_their_own_ways(taken: list[int]) -> None:
    """One prompt, several answers."""
    new, other = tokens(300), tokens(300)
    cache = LayerCache(CONFIG)
    for i in range(200):
        infllmv2_attention(*last(new, i), CONFIG, cache=cache)
    branch = copy.deepcopy(cache)
    assert branch.step is None and cache.step is not None
    for i in range(200, 300):
        for x, held in ((new, cache), (other, branch)):
            got = infllmv2_attention(*last(x, i), CONFIG, cache=held)
            whole = infllmv2_attention(last(x, i)[0], held.keys, held.values, CONFIG)
            assert torch.equal(got, whole)
    assert torch.equal(cache.keys, new[1])
    assert torch.equal(branch.keys[:, :, 200:], other[1][:, :, 200:])
    assert len(taken) > 350


def test_layers_of_a_sparse_cache_have_their_own(taken: list[int]) -> None:
    cache = SparseCache(CONFIG)
    new = [tokens(260) for _ in range(2)]
    for layer, x in enumerate(new):
        cache.update(x[1][:, :, :200], x[2][:, :, :200], layer)
    for i in range(200, 260):
        for layer, x in enumerate(new):
            got = infllmv2_attention(*last(x, i), CONFIG, cache=cache.layers[layer])
            whole = infllmv2_attention(
                x[0][:, :, i : i + 1], *(y[:, :, : i + 1] for y in x[1:]), CONFIG
            )
            assert torch.equal(got, whole)
    assert len(taken) > 100
    assert cache.get_seq_length() == 260
    assert torch.equal(cache.layers[1].keys, new[1][1])
