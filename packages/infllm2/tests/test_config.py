from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from infllm2 import InfLLMv2Config


def test_trained_budget_is_one_plus_window_plus_chosen() -> None:
    config = InfLLMv2Config()
    assert (config.init_blocks, config.window_blocks, config.topk - config.init_blocks) == (
        1,
        32,
        63,
    )
    assert config.budget == 96


def test_reads_the_entry_of_a_minicpm4_config_json() -> None:
    entry = {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 2048,
        "topk": 64,
        "use_nope": False,
        "dense_len": 8192,
    }
    assert InfLLMv2Config.from_pretrained_config(entry) == InfLLMv2Config()
    holder = SimpleNamespace(sparse_config=entry | {"topk": 8})
    assert InfLLMv2Config.from_pretrained_config(holder).topk == 8


@pytest.mark.parametrize("entry", [None, SimpleNamespace(sparse_config=None), 3])
def test_missing_entry_is_an_error(entry: object) -> None:
    with pytest.raises(ValueError, match="sparse_config must be a mapping"):
        InfLLMv2Config.from_pretrained_config(entry)  # type: ignore[arg-type]


def test_unknown_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['top_k'\]"):
        InfLLMv2Config.from_pretrained_config({"top_k": 64})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be an integer of at least 1, got 0"),
        ({"topk": 1.5}, "topk must be an integer of at least 1, got 1.5"),
        ({"topk": True}, "topk must be an integer"),
        ({"init_blocks": -1}, "init_blocks must be an integer of at least 0"),
        ({"init_blocks": 65}, "init_blocks must not exceed topk"),
        ({"dense_len": -2}, "dense_len must be an integer of at least -1"),
        ({"kernel_size": 40}, "kernel_size must be a multiple of kernel_stride.*use 32"),
        ({"block_size": 24}, "block_size must be a multiple of kernel_stride"),
        ({"window_size": 100}, "window_size must be a multiple of block_size.*use 128"),
        ({"lse": "fast"}, 'lse must be "approx" or "exact"'),
        ({"compat": "sglang"}, 'compat must be None or "official"'),
        ({"compat": "official", "topk": 1}, "topk must exceed init_blocks, got topk=1"),
        ({"use_nope": 1}, "use_nope must be True or False, got 1"),
    ],
)
def test_bad_values_name_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfLLMv2Config(**change)  # type: ignore[arg-type]


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        InfLLMv2Config().topk = 3  # type: ignore[misc]
