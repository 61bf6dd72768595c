"""The collapsed scorer and the written-down reference, both against the fastText library."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import fasttext
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultraclean import Classifier, ClassifierConfig, train
from ultraclean.collapsing import collapse
from ultraclean.hashing import word_hashes
from ultraclean.library import predict
from ultraclean.reference import END, features, probability, word_hash

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
    theirs = predict(library, texts)
    assert len(texts) > 1000
    assert 0.05 < ours.mean() < 0.95, "a constant would pass"
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_equals_the_library_on_awkward_text(classifier: Classifier, library, text: str) -> None:
    ours, theirs = classifier.scorer.score([text])[0], predict(library, [text])[0]
    assert ours == pytest.approx(theirs, abs=1e-5)


ANY_TEXT = st.lists(
    st.one_of(
        st.sampled_from(["the", "of", "</s>", "__label__pos", "__label__x", "\0", "é", "\\n"]),
        st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])),
    )
).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT)
def test_equals_the_library_on_any_text(classifier: Classifier, library, text: str) -> None:
    ours, theirs = classifier.scorer.score([text])[0], predict(library, [text])[0]
    assert ours == pytest.approx(theirs, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(ANY_TEXT), size=st.integers(1, 60))
def test_a_score_does_not_depend_on_the_neighbours(
    classifier: Classifier, texts: list[str], size: int
) -> None:
    alone = [classifier.scorer.score([text])[0] for text in texts]
    with mock.patch("ultraclean.scorer.BATCH", size):
        assert classifier.scorer.score(texts).tolist() == alone


@pytest.mark.parametrize("ngrams", [1, 2, 5])
@pytest.mark.parametrize("min_count", [1, 150])  # 150: too few lines for `</s>` to have a row
def test_equals_the_library_at_other_settings(
    ngrams: int, min_count: int, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    config = ClassifierConfig(
        dim=5, bucket=777, min_count=min_count, lr=0.5, word_ngrams=ngrams, normaliser="dclm"
    )
    made = train(prose[:70], shuffled[:70], config, tmp_path / "x")
    assert (END in made.scorer.words) == (min_count == 1)
    texts = [*prose[:200], *shuffled[:200], *map(made.normaliser, AWKWARD)]
    ours, theirs = made.score(texts), made.score(texts, backend="reference")
    assert np.abs(ours - theirs).max() < 1e-5


def test_a_megabyte_of_words_is_nearer_the_truth_than_the_library(
    classifier: Classifier, library, prose: list[str]
) -> None:
    """The library adds up some 500,000 rows in fp32; how far that may be off has no such bound."""
    text = classifier.normaliser(" ".join(prose * 3))[:1_000_000]
    vocabulary = {w: i for i, w in enumerate(classifier.scorer.words)}
    inputs, outputs = library.get_input_matrix(), library.get_output_matrix()
    positive = library.get_labels().index("__label__pos")
    rows = features(text, vocabulary, 3, classifier.config.bucket)
    truth = probability(rows, inputs, outputs, positive)
    ours = classifier.scorer.score([text])[0]
    assert len(rows) > 200_000
    assert abs(ours - truth) < 1e-6
    assert abs(ours - truth) <= abs(predict(library, [text])[0] - truth) + 1e-7


def test_reference_equals_the_library(classifier: Classifier, library, prose: list[str]) -> None:
    words = library.get_words(on_unicode_error="replace")
    vocabulary = {w.encode(): i for i, w in enumerate(words)}
    inputs, outputs = library.get_input_matrix(), library.get_output_matrix()
    positive = library.get_labels().index("__label__pos")
    bucket = len(inputs) - len(words)
    for text in [*map(classifier.normaliser, prose[:30]), *AWKWARD[:-2]]:
        rows = features(text, vocabulary, classifier.config.word_ngrams, bucket)
        ours = probability(rows, inputs, outputs, positive)
        assert ours == pytest.approx(predict(library, [text])[0], abs=1e-6)


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


@given(st.lists(st.binary(max_size=40) | st.binary(min_size=300, max_size=310), max_size=40))
def test_hashes_of_many_words_are_those_of_each(words: list[bytes]) -> None:
    expected = [h - (1 << 32) if (h := word_hash(w)) >= 1 << 31 else h for w in words]
    assert word_hashes(words).view(np.int64).tolist() == expected
