from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmcu.stopping import StopStrings


def cut(text, stops):
    starts = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_any_splitting_gives_what_the_whole_text_gives_or_stops_earlier(text, stops, cuts):
    """A reader of the pieces sees a prefix, cut exactly where the first completed stop begins."""
    borders = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    stop = StopStrings(stops)
    seen, fed = "", ""
    for start, end in zip(borders, borders[1:], strict=False):
        seen += stop.feed(text[start:end])
        fed += text[start:end]
        if stop.stopped:
            break
    assert (seen + stop.flush(), stop.stopped) == cut(fed, stops)
    assert stop.stopped == cut(text, stops)[1]


def test_text_is_shown_as_soon_as_it_is_certain():
    stop = StopStrings(["END"])
    assert [stop.feed(p) for p in ("one E", "ND?", " more")] == ["one ", "", ""]
    stop = StopStrings(["END"])
    assert [stop.feed(p) for p in ("one E", "N", "x")] == ["one ", "", "ENx"]


def test_held_text_comes_at_the_end():
    stop = StopStrings(["END"])
    assert stop.feed("an EN") == "an "
    assert stop.flush() == "EN" and stop.flush() == ""


@pytest.mark.parametrize("bad", [[""], [3], ["a", None]])
def test_bad_stops(bad):
    with pytest.raises(ValueError, match="non-empty strings"):
        StopStrings(bad)
