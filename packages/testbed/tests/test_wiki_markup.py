from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.texts.wiki_markup import to_prose


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''italic'' text.", "Bold and italic text."),
        ("A [[link]], a [[page|label]], [[Rome|]] end.", "A link, a label, Rome end."),
        ("See [http://x.org the site] or [http://x.org].", "See the site or."),
        ("One.<ref>No.</ref> Two.<ref name=a/> Three.", "One. Two. Three."),
        ("One.<ref name='x'>{{cite web|url=http://a.b}}</ref>", "One."),
        ("{{Infobox|a={{nested|b}}|c=[[d]]}}\nText here.", "Text here."),
        ("It is {{convert|5|km|mi|0}} away.", "It is 5 km away."),
        ("{{convert|5|-|6|kg|lb}} heavy.", "5 - 6 kg heavy."),
        ("{{lang|fr|bonjour}} and {{nowrap|10 000}}.", "bonjour and 10 000."),
        ("Word ({{IPAc-en|x}}; {{lang-la|verbum}}) here.", "Word (verbum) here."),
        ("Word ({{IPAc-en|x}}) here.", "Word here."),
        ("{{quote|See [[a|b]] there.|Author}}", "See b there."),
        ("{| class=x\n|-\n| cell\n{|\n| inner\n|}\n|}\nAfter it.", "After it."),
        ("{|\n| cell\nmore of the cell\n|}\nAfter it.", "After it."),
        ("[[File:x.jpg|thumb|A [[caption]] with a link]]\nText.", "Text."),
        ("[[Category:Cats]]\n[[fr:Chat]]\nText.", "Text."),
        ("<!-- not\nthis -->Text &amp;ndash; &lt;more.", "Text – <more."),
        ("a<sub>2</sub>b<br />c <nowiki>d</nowiki>", "a2b c d"),
        ("* one item\n# two items\n: indented", "- one item\n\n- two items\n\nindented"),
        ("Intro.\n== Title ==\nBody.", "Intro.\n\nTitle\n\nBody."),
        ("== Empty ==\n== Title ==\n=== Sub ===\nBody.", "Title\n\nSub\n\nBody."),
        ("Body.\n== See also ==\n* [[x y]]\n=== Deeper ===\nNo.\n== Next ==\nYes.",
         "Body.\n\nNext\n\nYes."),
        ("Body.\n==References==\n{{reflist}}\nleft over", "Body."),
        ("__NOTOC__Text {{{1|parameter}}} here.", "Text here."),
        ("<math>x^{2}</math> is squared, <math>y", "is squared, y"),
        ("unclosed {{template|a\nNext line.", "unclosed\n\nNext line."),
        ("", ""),
    ],
)  # fmt: skip
def test_known_markup(markup: str, prose: str) -> None:
    assert to_prose(markup) == prose


PIECES = st.sampled_from(
    ["{{", "}}", "[[", "]]", "{|", "|}", "|", "<ref>", "</ref>", "<!--", "-->", "''", "==", "\n"]
    + ["word ", "File:", "http://a.b ", "lang", "&lt;", "*", "("]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_nesting_ends_and_leaves_no_links_or_tables(markup: str) -> None:
    prose = to_prose(markup)
    for residue in ("[[", "]]", "{{", "}}", "<ref>", "''"):
        assert residue not in prose
    assert "\n\n\n" not in prose
    assert prose == prose.strip()
