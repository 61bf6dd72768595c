"""The native scorer against fastText, against NumPy, and against normalising in Python."""

from __future__ import annotations

import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultraclean import Classifier, ClassifierConfig, Scorer, native, train
from ultraclean.bpe import Unsupported, tables_of
from ultraclean.normalise import Normaliser

SPECIAL = [
    *("\n", "\r", "\t", "\x0b", "\0", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", " ", "  "),
    *("</s>", "<|end|>", "__label__pos", "__label__", "the", " of", "Σ", "ΟΔΥΣΣΕΥΣ", "İ", "ﬁ"),
    *("か\u3099", "e\u0301\u0323", "\u302e\u0301", "\U0001d165\U0001d16d", "한국어", "Ⅷ½", "12"),
    *("中文", "。", "!?", "…", "\ufffd", "\U0001f642\u200d", "\ufdfa", "x" * 90, "Ǆ", "\n\n\n\n"),
]


def documents() -> list[str]:
    """Every code point, and thousands of adversarial mixtures."""
    draw = random.Random(0)
    points = [chr(p) for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    points = [
        c for c in points if unicodedata.category(c) not in ("Cn", "Co") or draw.random() < 0.02
    ]
    every = ["".join(points[i : i + 150]) for i in range(0, len(points), 150)]
    mixed = [
        "".join(
            draw.choice(SPECIAL) if draw.random() < 0.5 else draw.choice(" abcdefgh")
            if draw.random() < 0.8 else draw.choice(points)
            for _ in range(draw.randint(0, 60))
        )
        for _ in range(3000)
    ]  # fmt: skip
    return [*every, *mixed, *SPECIAL, "", "x" * 50_000, "中" * 20_000, " " * 9_000, "é" * 30_000]


DOCUMENTS = documents()


@pytest.fixture(scope="module", params=["ultrafine", "other tokenizer", "ultrafine-words",
                                        "whitespace", "dclm", "zh-char"])  # fmt: skip
def trained(
    request: pytest.FixtureRequest, prose: list[str], shuffled: list[str],
    other_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory,
) -> Classifier:  # fmt: skip
    if request.param == "ultrafine":
        return request.getfixturevalue("ultrafine")
    other = request.param == "other tokenizer"
    config = ClassifierConfig(
        dim=8, bucket=20_000, min_count=3, lr=0.5,
        normaliser="ultrafine" if other else request.param,
        tokenizer=str(other_tokenizer_file) if other else None,
    )  # fmt: skip
    # Words of the adversarial texts are in the seeds, or most of them would have no row.
    good, bad = prose[:400] + DOCUMENTS[:200:2], shuffled[:400] + DOCUMENTS[1:200:2]
    return train(good, bad, config, tmp_path_factory.mktemp("trained") / "c")


def test_raw_text_scores_as_the_normalised_text_does(
    trained: Classifier, prose: list[str], shuffled: list[str]
) -> None:
    """The table of code points, the native BPE and the tokens' features, against the plain path."""
    texts = [*DOCUMENTS, *prose[:300], *shuffled[:300]]
    ours, counted = trained.scorer.score_raw(texts, trained.normaliser)
    made = [trained.normaliser(text) for text in texts]
    assert trained.scorer.backend == "native"
    assert ours.tolist() == trained.scorer.score(made).tolist()
    assert 0.05 < ours.mean() < 0.95 and counted[-1] > 20


def test_training_reads_the_words_that_scoring_does(trained: Classifier, prose: list[str]) -> None:
    from ultraclean.training import _plainly, _prepare

    texts = [t for t in [*DOCUMENTS, *prose[:300]] if t.strip()]
    plain = [_plainly(text, trained.normaliser) for text in texts]
    assert _prepare([*texts, "", " \n "], trained.normaliser) == [line for line in plain if line]
    assert len(set(plain)) > 1000 and b"" in plain  # texts of marks alone have no word


def test_and_both_as_the_library_says(
    trained: Classifier, prose: list[str], shuffled: list[str]
) -> None:
    texts = [*DOCUMENTS, *prose, *shuffled]
    assert len(texts) > 5000
    theirs = trained.score(texts, backend="reference")
    assert trained.score(texts, exact=True).tolist() == theirs.tolist()
    # Of tens of thousands of rows the library's own fp32 sum is off by more.
    short = np.array([len(t) < 8000 for t in texts])
    assert np.abs(trained.score(texts) - theirs)[short].max() < 1e-5


def test_tokens_are_those_of_the_library(ultrafine: Classifier, prose: list[str]) -> None:
    assert ultrafine.normaliser.tables is not None
    _, counted = ultrafine.scorer.score_raw(DOCUMENTS + prose, ultrafine.normaliser)
    _, offsets = ultrafine.normaliser.ids(DOCUMENTS + prose)
    assert counted.tolist() == np.diff(offsets).tolist()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(max_size=20))).map("".join))
def test_any_text(ultrafine: Classifier, text: str) -> None:
    made = ultrafine.normaliser(text)
    ours = ultrafine.scorer.score_raw([text], ultrafine.normaliser)[0][0]
    assert ours == ultrafine.scorer.score([made])[0]
    assert ours == pytest.approx(ultrafine.score([text], backend="reference")[0], abs=1e-5)


def test_numpy_where_there_is_no_compiler(
    classifier: Classifier, ultrafine: Classifier, prose: list[str]
) -> None:
    for c in (classifier, ultrafine):
        plain = Scorer.load(c.folder, 3, "numpy")
        texts = [*DOCUMENTS[-2000:], *prose[:200]]
        found, _ = plain.score_raw(texts, c.normaliser)
        assert np.abs(found - c.score(texts)).max() < 1e-6


def test_threads_share_a_scorer(ultrafine: Classifier, prose: list[str]) -> None:
    alone = ultrafine.score(prose).tolist()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(ultrafine.score, [prose] * 8):
            assert found.tolist() == alone


def test_a_full_cache_begins_anew(ultrafine: Classifier) -> None:
    draw = random.Random(1)
    texts = [" ".join("".join(draw.choices("abcdefghij", k=9)) for _ in range(20_000))
             for _ in range(5)]  # fmt: skip
    ours = ultrafine.score(texts)
    assert ours.tolist() == ultrafine.scorer.score(map(ultrafine.normaliser, texts)).tolist()


def test_tokenizers_left_to_the_library_say_why(other_tokenizer_file: Path) -> None:
    tables, reason = tables_of(other_tokenizer_file.read_bytes())
    assert tables is None and "splits by" in reason
    assert issubclass(Unsupported, ValueError)
    assert tables_of(b'{"model": {"type": "WordPiece"}}')[1] == "its model is not a plain BPE"
    assert "not understood" in tables_of(b"{}")[1]
    assert Normaliser("ultrafine", other_tokenizer_file).tables is None


def test_bad_arguments(classifier: Classifier) -> None:
    table, words = classifier.scorer.table, b"a\nb\n"
    with pytest.raises(ValueError, match=r"1\.\.16"):
        Scorer(table, words, 17)
    with pytest.raises(ValueError, match="unknown backend"):
        Scorer(table, words, 3, "gpu")
    assert Scorer(table, words, 1).score([]).tolist() == []
    assert native.library()[1] == ""
