from __future__ import annotations

import dataclasses

import pytest

from apb import APBConfig


@pytest.mark.parametrize("hosts", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("tokens", [8, 9, 31, 64, 101])
def test_blocks_cover_the_document_and_differ_by_at_most_one(hosts: int, tokens: int) -> None:
    blocks = APBConfig(hosts=hosts).lengths(tokens).blocks
    assert len(blocks) == hosts and sum(blocks) == tokens
    assert list(blocks) == sorted(blocks, reverse=True) and blocks[0] - blocks[-1] <= 1


def test_defaults_are_those_of_the_authors_at_128k() -> None:
    lengths = APBConfig(hosts=8).lengths(128 * 1024)
    assert (lengths.blocks[0], lengths.anchor, lengths.passing) == (16384, 4096, 2048)


def test_given_lengths_win() -> None:
    lengths = APBConfig(hosts=2, anchor_length=3, passing_length=99).lengths(20)
    assert (lengths.anchor, lengths.passing) == (3, 99)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hosts": 0}, "hosts must be at least 1, got 0"),
        ({"hosts": True}, "hosts must be an integer, got True"),
        ({"hosts": 2.0}, "hosts must be an integer"),
        ({"hosts": 2, "anchor_length": -1}, "anchor_length must be at least 0, got -1"),
        ({"hosts": 2, "passing_length": -3}, "passing_length must be at least 0, got -3"),
        ({"hosts": 2, "passing_length": "8"}, "passing_length must be an integer"),
        ({"hosts": 2, "pool_kernel": 4}, "pool_kernel must be odd.* use 5"),
        ({"hosts": 2, "pool_kernel": 0}, "pool_kernel must be at least 1"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APBConfig(**fields)


def test_what_the_document_makes_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="hosts=8 needs at least one .* got 5 .* hosts=5 or fewer"):
        APBConfig(hosts=8).lengths(5)
    with pytest.raises(ValueError, match="anchor_length=6 is longer than .* use at most 5"):
        APBConfig(hosts=2, anchor_length=6).lengths(10)
    assert APBConfig(hosts=2, anchor_length=5).lengths(10).anchor == 5


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        APBConfig(hosts=2).hosts = 3  # type: ignore[misc]
