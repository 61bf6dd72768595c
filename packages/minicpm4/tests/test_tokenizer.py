"""A byte-level BPE: every text round-trips, and the same texts give the same vocabulary."""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minicpm4.tokenizer import END, train_bpe

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS[:20], 600)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if END not in text:
        assert tokenizer.decode(ids) == text
        assert all(1 <= i < 600 for i in ids)


def test_size_ends_digits_and_compression(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 600
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    ids = tokenizer("in 2026", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids][-4:] == list("2026")
    text = "".join(TEXTS[20:30])
    assert len(tokenizer(text)["input_ids"]) < 0.6 * len(text.encode())


def test_it_is_saved_as_transformers_reads_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve 東京 🙂\t if x:\n    return 1\r\n" + END
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again(text)["input_ids"][-1] == 0 == again.eos_token_id
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text[: -len(END)]
    # Beside a model, whose configuration the Auto class looks at first.
    from minicpm4 import register
    from minicpm4.presets import tiny

    register()
    tiny().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == again(text)


def test_the_vocabulary_does_not_depend_on_the_process(tokenizer: PreTrainedTokenizerFast) -> None:
    def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
        return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    program = (
        "import hashlib, sys, json; from minicpm4.tokenizer import train_bpe\n"
        "t = train_bpe(json.load(sys.stdin), 600)\n"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    texts = json.dumps(TEXTS[:20])
    other = subprocess.run(
        [sys.executable, "-c", program], input=texts, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == fingerprint(tokenizer)
    assert fingerprint(train_bpe(iter(TEXTS[:20]), 600)) == fingerprint(tokenizer)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 257 .* got 256"):
        train_bpe(TEXTS, 256)
    assert len(train_bpe([""], 257)) == 257
