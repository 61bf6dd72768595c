"""The collapsed scorer and the written-down reference, both against the fastText library."""

from __future__ import annotations

import fasttext
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultraclean import Classifier
from ultraclean.classifier import predict
from ultraclean.reference import features, probability, word_hash
from ultraclean.scorer import collapse

AWKWARD = [
    "",
    " ",
    "</s>",
    "a </s> everything after is ignored __label__pos",
    "</s></s> is a word </s>",
    "__label__pos __label__neg __label__unknown word",
    "nul\0separates\0words",
    "tab\tand\vvertical\fform\rreturn",
    "é ü 中文 字 🙂 ﬁ é",
    "\x85\xa0\u2028 not separators to fastText",
    "unseenword " * 50,
    "the",
    "the of the of the",
    "x" * 1_000_000,
    "word " * 2_000,  # far longer, and the fp32 sum of the library itself is off by over 1e-5
]


@pytest.fixture(scope="module")
def library(classifier: Classifier):
    return fasttext.load_model(str(classifier.folder / "model.bin"))


def test_equals_the_library_on_real_text(
    classifier: Classifier, library, prose: list[str], shuffled: list[str]
) -> None:
    texts = [classifier.normaliser(t) for t in [*prose, *shuffled]]
    ours = classifier.scorer.score(texts)
    theirs = np.array([predict(library, t) for t in texts], np.float32)
    assert len(texts) > 1000
    assert 0.05 < ours.mean() < 0.95, "a constant would pass"
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_equals_the_library_on_awkward_text(classifier: Classifier, library, text: str) -> None:
    assert classifier.scorer.score_one(text) == pytest.approx(predict(library, text), abs=1e-5)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["the", "of", "</s>", "__label__pos", "__label__x", "\0", "é", "\\n"]),
            st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])),
        )
    ).map(" ".join)
)
def test_equals_the_library_on_any_text(classifier: Classifier, library, text: str) -> None:
    assert classifier.scorer.score_one(text) == pytest.approx(predict(library, text), abs=1e-5)


def test_reference_equals_the_library(classifier: Classifier, library, prose: list[str]) -> None:
    words = library.get_words(on_unicode_error="replace")
    vocabulary = {w.encode(): i for i, w in enumerate(words)}
    inputs, outputs = library.get_input_matrix(), library.get_output_matrix()
    positive = library.get_labels().index("__label__pos")
    bucket = len(inputs) - len(words)
    for text in [*map(classifier.normaliser, prose[:30]), *AWKWARD[:-2]]:
        rows = features(text, vocabulary, classifier.config.word_ngrams, bucket)
        ours = probability(rows, inputs, outputs, positive)
        assert ours == pytest.approx(predict(library, text), abs=1e-6)


def test_collapse_is_the_product() -> None:
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(70_000, 5)).astype(np.float32)  # more than one piece
    positive, negative = draw.normal(size=(2, 5)).astype(np.float32)
    assert np.allclose(
        collapse(inputs, positive, negative), inputs @ (positive - negative), atol=1e-5
    )


def test_hash_is_fnv1a_where_bytes_are_ascii() -> None:
    # Published FNV-1a test vectors.
    assert word_hash(b"") == 0x811C9DC5
    assert word_hash(b"a") == 0xE40C292C
    assert word_hash(b"foobar") == 0xBF9CF968


def test_memory_of_unknown_words_is_bounded(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultraclean.scorer._MEMORY", 10)
    before = classifier.scorer.score_one("alpha beta gamma")
    classifier.scorer.score([f"new{i}" for i in range(100)])
    assert len(classifier.scorer._unknown) <= 10
    assert classifier.scorer.score_one("alpha beta gamma") == before
