"""Token files, and batches that are a function of (seed, step)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from minicpm4.data import TokenData, pack
from minicpm4.tokenizer import train_bpe

TEXTS = ["abc " * 30, "", "ünïcode 東京", "d" * 50]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 300)


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> TokenData:
    return pack(TEXTS, tokenizer, tmp_path / "data")


def test_the_stream_is_the_texts_each_ended(
    data: TokenData, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ends = np.flatnonzero(data.tokens == tokenizer.eos_token_id)
    assert len(ends) == len(TEXTS) and ends[-1] == len(data) - 1
    starts = [0, *(ends[:-1] + 1)]
    assert [tokenizer.decode(data.tokens[a:b]) for a, b in zip(starts, ends, strict=True)] == TEXTS
    assert data.bytes == sum(len(text.encode()) for text in TEXTS)
    assert data.tokens.dtype == np.uint16 and isinstance(data.tokens, np.memmap)
    again = TokenData(tmp_path / "data")
    assert np.array_equal(again.tokens, data.tokens) and again.bytes == data.bytes


def test_a_large_vocabulary_gets_wide_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Wide:
        eos_token_id = 70_000

        def __len__(self) -> int:
            return 70_001

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [65_536, 69_999]}

    wide = pack(["x"], Wide(), tmp_path / "wide")
    assert wide.tokens.tolist() == [65_536, 69_999, 70_000] and wide.tokens.dtype == np.uint32


def test_batches_are_a_function_of_seed_and_step(data: TokenData) -> None:
    first = data.batch(seed=1, step=5, size=6, length=16)
    assert first.shape == (6, 17) and first.dtype == np.int64
    data.batch(seed=1, step=6, size=6, length=16)
    np.random.seed(0)
    assert np.array_equal(data.batch(1, 5, 6, 16), first)
    for seed, step in ((1, 6), (2, 5), (5, 1), (-1, 5)):
        assert not np.array_equal(data.batch(seed, step, 6, 16), first)
    # Seeds beyond 2**53 keep their last bit.
    assert not np.array_equal(data.batch(2**64 - 1, 5, 6, 16), data.batch(2**64 - 2, 5, 6, 16))
    stream = data.tokens.tolist()
    windows = {tuple(stream[s : s + 17]) for s in range(len(stream) - 16)}
    assert {tuple(row) for row in first.tolist()} <= windows


def test_every_window_can_come_the_first_and_the_last_too(data: TokenData) -> None:
    length = len(data) - 4
    seen = {row[:3] for s in range(60) for row in map(tuple, data.batch(0, s, 4, length))}
    assert seen == {tuple(data.tokens[s : s + 3].tolist()) for s in range(4)}
    whole = data.batch(0, 0, 2, len(data) - 1)
    assert np.array_equal(whole[1], data.tokens)


def test_validation_windows_are_spread_and_each_comes_once(data: TokenData) -> None:
    batches = list(data.windows(count=5, size=2, length=10))
    assert [len(b) for b in batches] == [2, 2, 1]
    rows = np.concatenate(batches)
    assert np.array_equal(rows[0], data.tokens[:11])
    assert np.array_equal(rows[-1], data.tokens[-11:])
    # More windows asked for than there are: each once, not some twice.
    assert sum(len(b) for b in data.windows(10**4, 64, len(data) - 3)) == 3


def test_what_is_missing_or_too_short_is_said(
    data: TokenData, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="holds no packed tokens .*tokens.json is missing"):
        TokenData(tmp_path / "nothing")
    (tmp_path / "data" / "tokens.npy").unlink()
    with pytest.raises(FileNotFoundError, match="tokens.npy is missing"):
        TokenData(tmp_path / "data")
    with pytest.raises(ValueError, match="fewer than one window of .*: give more text"):
        data.batch(0, 0, 1, len(data))
    with pytest.raises(ValueError, match="fewer than a window"):
        list(data.windows(1, 1, len(data)))
    with pytest.raises(ValueError, match="there is no text to pack"):
        pack([], tokenizer, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
