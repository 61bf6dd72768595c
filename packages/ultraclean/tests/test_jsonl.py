"""The quick JSON reader must say what Python's says, and lose nothing of a line."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultraclean.jsonl import Block, parse, parse_plainly, with_columns
from ultraclean.jsonl_format import JsonLines
from ultraclean.ordered import ahead

LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(
    st.characters() | st.characters(categories=["Cs"])
)  # fmt: skip
RECORD = st.dictionaries(st.text(max_size=4), LEAF | st.lists(LEAF, max_size=3), max_size=4)


def same(a: object, b: object) -> bool:
    """Equal, where two NaN are, and a long integer is what the quick reader makes of it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, int) and abs(a) >= 1 << 63:
        return b == a or b == float(a)
    return a == b or (a != a and b != b)


@given(record=RECORD, text=st.text(min_size=1), ascii_only=st.booleans(), indent=st.booleans())
def test_reads_what_python_reads(record: dict, text: str, ascii_only: bool, indent: bool) -> None:
    written = json.dumps({**record, "text": text}, ensure_ascii=ascii_only,
                         separators=None if indent else (",", ":"))  # fmt: skip
    line = written.encode("utf-8", "surrogatepass")
    plain, why = parse_plainly(line)
    found, reason = parse(line, "text")
    if why:
        assert (found, reason) == (None, why)
    elif not text.strip():
        assert (found, reason) == (None, "empty")
    else:
        assert reason == "" and same(plain, found)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a", "text": "b"}', ""),
        (b'{"text": "a\\ud800"}', ""),
        (b'{"text": "a", "x": NaN, "y": -Infinity, "z": 1e999}', ""),
        (b' \t{"text": "a"} \r', ""),
        (b'{"text": "a", "deep": ' + b"[" * 1500 + b"]" * 1500 + b"}", None),
        (b'{"text": "a", "deep": ' + b"[" * 100_000, "bad JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "bad JSON"),
        (b'{"text": "a\tb"}', "bad JSON"),
        (b'{"text": "a", "n": 01}', "bad JSON"),
        (b"{'text': 'a'}", "bad JSON"),
        (b'{"text": "a"} {}', "bad JSON"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
        (b'{"text": "a', "bad JSON"),
    ],
)
def test_odd_lines(line: bytes, reason: str | None) -> None:
    found, why = parse(line, "text")
    plain, expected = parse_plainly(line)
    assert why == expected and (found is None) == (plain is None)
    if reason is not None:
        assert why == reason
    if found is not None:
        assert same(plain, found)


def test_long_numbers_keep_their_digits() -> None:
    digits = "123456789012345678901234567890"
    line = f'{{"text": "a", "n": {digits}, "ultraclean_score": 0.5}}'.encode()
    record, _ = parse(line, "text")
    again = with_columns(line, record, {"ultraclean_score": 0.25})
    assert json.loads(again) == {"text": "a", "n": int(digits), "ultraclean_score": 0.25}
    plain = f'{{"text": "a", "n": {digits}}}'.encode()
    record, _ = parse(plain, "text")
    assert with_columns(plain, record, {"ultraclean_score": 0.25}) == (
        plain[:-1] + b', "ultraclean_score": 0.25}\n'
    )
    named = f'{{"text": "a", "source": {digits}}}'.encode()
    assert JsonLines("text", "source", 1 << 20, "").parse(Block(1, named)).sources == [digits]


def test_a_reader_ahead_gives_all_in_order_and_passes_errors_on() -> None:
    assert list(ahead(range(100), 3)) == list(range(100))

    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    found = ahead(fails(), 3)
    assert next(found) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(found)

    closed = threading.Event()

    def endless() -> Iterator[float]:
        try:
            while True:
                yield math.pi
        finally:
            closed.set()

    left = ahead(endless(), 3)
    next(left)
    left.close()
    assert not any(t.name == "ultraclean-reader" for t in threading.enumerate())
