"""What is wrong with a call is said before anything changes: expected, came, fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from infllm2 import InfLLMv2Config, LayerCache, infllmv2_attention, select_blocks

CONFIG = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.numpy(), k, v), "q must be a torch.Tensor, got ndarray"),
        (lambda q, k, v: (q, k.tolist(), v), "k must be a torch.Tensor, got list"),
        (lambda q, k, v: (q, k, None), "v must be a torch.Tensor, got NoneType"),
        (lambda q, k, v: (q, k[0], v[0]), "k must have 4 dimensions"),
        (lambda q, k, v: (q, k, v[:, :, :1]), "k and v must have one shape"),
        (lambda q, k, v: (q, k, v.double()), "k and v must share dtype and device"),
        (lambda q, k, v: (q[:, :5], k, v), "positive multiple"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_tensors(change: Callable, message: str, cached: bool, randn: Callable) -> None:
    cache = LayerCache(CONFIG) if cached else None
    if cached:
        infllmv2_attention(*randn(7), CONFIG, cache=cache)
    with pytest.raises(ValueError, match=message):
        infllmv2_attention(*change(*randn(100)), CONFIG, cache=cache)
    assert cache is None or cache.length == 7  # as before the error


def test_tensors_without_values(randn: Callable) -> None:
    nowhere = tuple(x.to("meta") for x in randn(100))
    with pytest.raises(ValueError, match="on meta"):
        infllmv2_attention(*nowhere, CONFIG)


@pytest.mark.parametrize("config", [None, {"topk": 3}, "openbmb/MiniCPM4-8B"])
def test_configurations(config: Any, randn: Callable) -> None:
    q, k, v = randn(100)
    for call in (lambda: infllmv2_attention(q, k, v, config), lambda: select_blocks(q, k, config)):
        with pytest.raises(ValueError, match="config must be an InfLLMv2Config, got .*build one"):
            call()


@pytest.mark.parametrize("cache", [(), True, torch.zeros(1), "transformers"])
def test_caches_of_another_kind(cache: Any, randn: Callable) -> None:
    if cache == "transformers":
        cache = pytest.importorskip("transformers").DynamicCache()
    with pytest.raises(ValueError, match="cache must be a LayerCache.*one layer of a SparseCache"):
        infllmv2_attention(*randn(100), CONFIG, cache=cache)


def test_caches_of_other_sizes(randn: Callable) -> None:
    cache = LayerCache(replace(CONFIG, kernel_size=16))
    with pytest.raises(ValueError, match=r"\[16, 4, 16, 5\], attention runs with \[8, 4, 16, 5\]"):
        infllmv2_attention(*randn(100), CONFIG, cache=cache)
    cache = LayerCache(CONFIG)
    with pytest.raises(ValueError, match="backend must be one of"):
        infllmv2_attention(*randn(100), CONFIG, cache=cache, backend="cuda")
    assert cache.length == 0
    k = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"one batch, heads and length, got \(1, 2, 3, 8\)"):
        cache.update(k, k[:, :, :1])
    cache.update(k, k)
    with pytest.raises(ValueError, match="new values .* do not fit the cache"):
        cache.update(k, torch.zeros(1, 2, 3, 9))
    with pytest.raises(ValueError, match="length must be at least 0"):
        cache.crop(-1)
    assert cache.length == 3


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (torch.tensor([0.0, 100.0]), r"must be integers .*, got torch.float32 \(2,\)"),
        (torch.tensor([[0, 100]]), r"must be integers .*, got torch.int64 \(1, 2\)"),
        ([0, 50.0, 100], "must be integers"),
        (100, "must be integers .* got 100"),
        ([], r"must ascend from 0 to the 100 packed positions, got \[\]"),
        ([0, 99], "must ascend from 0 to the 100 packed positions"),
        ([0, 60, 40, 100], "must ascend"),
    ],
)
def test_packed_sequences(ends: Any, message: str, randn: Callable) -> None:
    q, k, v = randn(100)
    with pytest.raises(ValueError, match=message):
        infllmv2_attention(q, k, v, CONFIG, cu_seqlens=ends)
    with pytest.raises(ValueError, match="batch 1 and one length"):
        infllmv2_attention(q[:, :, :9], k, v, CONFIG, cu_seqlens=[0, 9])
    with pytest.raises(ValueError, match="k and v must have one shape"):
        infllmv2_attention(q, k, torch.cat([v, v], 2), CONFIG, cu_seqlens=[0, 100])
    with pytest.raises(ValueError, match="exclude each other"):
        infllmv2_attention(q, k, v, CONFIG, cu_seqlens=[0, 100], cache=LayerCache(CONFIG))
    assert infllmv2_attention(q, k, v, CONFIG, cu_seqlens=[0, 40, 100]).shape == q.shape


def test_queries_and_keys_before_rotary_embedding(randn: Callable) -> None:
    """Of other shapes they would name blocks of keys that are not there."""
    config, (q, k, v) = replace(CONFIG, use_nope=True), randn(100)
    for unrotated, message in (
        (None, r"pass them as unrotated=\(q, k\)"),
        ((q, k, v), r"unrotated must be \(q, k\)"),
        ((q, torch.cat([k, k], 2)), "unrotated k must have k's batch, heads and length"),
        ((q[:, :, 1:], k), "unrotated q must have q's batch, heads and length"),
        ((q[:, :2], k[:, :1]), "unrotated q must have q's"),
    ):
        with pytest.raises(ValueError, match=message):
            infllmv2_attention(q, k, v, config, unrotated=unrotated)
    with pytest.raises(ValueError, match="which a cache does not hold"):
        infllmv2_attention(q, k, v, config, unrotated=(q, k), cache=LayerCache(config))
    part = (q[..., :8], k[..., :8])  # rotary embedding of some models takes a part of a head
    assert infllmv2_attention(q, k, v, config, unrotated=part).shape == q.shape


def test_a_whole_config_json_is_read_as_its_entry() -> None:
    entry = {
        "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64,
        "window_size": 2048, "topk": 64, "use_nope": False, "dense_len": 8192,
    }  # fmt: skip
    for given in (entry, {"model_type": "minicpm", "sparse_config": entry}):
        assert InfLLMv2Config.from_pretrained_config(given) == InfLLMv2Config()
    with pytest.raises(ValueError, match="unknown fields"):
        InfLLMv2Config.from_pretrained_config({"model_type": "llama"})
