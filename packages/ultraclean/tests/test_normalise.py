from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultraclean import Normaliser

NAMES = ["ultrafine-words", "whitespace", "dclm", "zh-char"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ultrafine-words", "Café  ÀB\n\n\n\nx\ty", r"cafe ab \n \n x y"),
        ("ultrafine-words", "ﬁne\r\n", r"fine\r \n"),
        ("whitespace", " A\n b ", "A b"),
        ("dclm", "One  Two\nthree\n", "One  Two three"),
        ("zh-char", "你好, World", "你 好 , world"),
    ],
)
def test_examples(name: str, text: str, words: str) -> None:
    assert Normaliser(name)(text) == words


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text())
def test_result_is_one_line_without_marks(name: str, text: str) -> None:
    words = Normaliser(name)(text)
    if name != "dclm":
        assert "\n" not in words
    if name in ("ultrafine-words", "zh-char"):
        assert not any(unicodedata.category(c) == "Mn" for c in words)
    assert words == words.strip(" ")
    words.encode("utf-8")


def test_lone_surrogates_do_not_fail() -> None:
    assert Normaliser("whitespace")("a\ud800b") == "a?b"


def test_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown normaliser 'x': expected one of ultrafine"):
        Normaliser("x")
    with pytest.raises(ValueError, match="needs tokenizer=PATH"):
        Normaliser("ultrafine")
    with pytest.raises(ValueError, match="takes no tokenizer"):
        Normaliser("dclm", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer .* does not exist"):
        Normaliser("ultrafine", tmp_path / "t.json")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        Normaliser("ultrafine", tmp_path / "t.json")
