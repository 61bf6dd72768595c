"""Our own trainer: against autograd, against a wide network, against the library."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import fasttext
import numpy as np
import pytest
import torch

from ultraclean import Classifier, ClassifierConfig, auc, precision_recall_f1, train, width_one
from ultraclean._files import sha256
from ultraclean.reference import END, features
from ultraclean.vocabulary import count_words
from ultraclean.width_one import Fitted, fit

SMALL = ClassifierConfig(dim=8, bucket=500, min_count=2, lr=0.5)


def seeds(prose: list[str], shuffled: list[str]) -> tuple[list[bytes], list[bool]]:
    """Words of both kinds in turn, and texts that end early, are empty, or have no known word."""
    odd = [b"", b"  ", b"</s> never read", b"seen </s> unread", b"q", b"\xff\xfe x", b"a\0b\tc d"]
    pairs = [(" ".join(t.split()).encode(), i % 2 == 0)
             for pair in zip(prose[:90], shuffled[:90], strict=True)
             for i, t in enumerate(pair)]  # fmt: skip
    pairs += [(text, i % 2 == 0) for i, text in enumerate(odd * 2)]
    random.Random(0).shuffle(pairs)
    return [text for text, _ in pairs], [good for _, good in pairs]


def equal(a: Fitted, b: Fitted) -> bool:
    same = (a.words, a.counts, a.output) == (b.words, b.counts, b.output)
    return same and a.table.tobytes() == b.table.tobytes()


@pytest.mark.parametrize("ngrams", [1, 2, 3, 5])
def test_threads_change_nothing(ngrams: int, prose: list[str], shuffled: list[str]) -> None:
    documents, good = seeds(prose, shuffled)
    config = replace(SMALL, word_ngrams=ngrams)
    alone = fit(documents, good, config)
    assert np.count_nonzero(alone.table) > 300
    for threads in (2, 3, 4, 9):
        assert equal(fit(documents, good, replace(config, threads=threads)), alone), threads


@pytest.mark.parametrize("ngrams", [1, 3])
def test_native_steps_are_the_plain_ones(
    ngrams: int, prose: list[str], shuffled: list[str]
) -> None:
    documents, good = seeds(prose, shuffled)
    config = replace(SMALL, word_ngrams=ngrams)
    native, plain = (fit(documents, good, config, backend=b) for b in ("native", "numpy"))
    assert (native.words, native.counts) == (plain.words, plain.counts)
    assert native.output == pytest.approx(plain.output, rel=1e-6)
    assert np.abs(native.table - plain.table).max() < 1e-5 * np.abs(plain.table).max()


def incidence(documents: list[bytes], fitted: Fitted, config: ClassifierConfig) -> torch.Tensor:
    """Share of each row in each document, fp64 `[documents, rows]`, by the scorer's reference."""
    vocabulary = {word: row for row, word in enumerate(fitted.words)}
    shares = torch.zeros(len(documents), len(fitted.table), dtype=torch.float64)
    for i, document in enumerate(documents):
        rows = features(document.decode(), vocabulary, config.word_ngrams, config.bucket)
        for row in rows:
            shares[i, row] += 1 / len(rows)
    return shares


TINY = [b"a b c a", b"b d a", b"c c d e", b"e a", b"d e d b a", b"b", b"a e e", b"c b a d"]
TINY_GOOD = [True, False, False, True, False, True, True, False]


def descended(
    inputs: torch.Tensor, outputs: torch.Tensor, shares: torch.Tensor, config: ClassifierConfig
) -> None:
    """fastText's network and loss, a document at a time, by autograd; column 0 is good."""
    inputs.requires_grad, outputs.requires_grad = True, True
    sizes = [len(document.split()) + 1 for document in TINY]
    done, total = 0, config.epochs * sum(sizes)
    for _ in range(config.epochs):
        for i, good in enumerate(TINY_GOOD):
            logits = (shares[i] @ inputs @ outputs.T)[None]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1 - int(good)]))
            slopes = torch.autograd.grad(loss, (inputs, outputs))
            for tensor, slope in zip((inputs, outputs), slopes, strict=True):
                tensor.data -= config.lr * (1 - done / total) * slope
            done += sizes[i]


def test_steps_are_autograd_s() -> None:
    """The network of width one, descended by PyTorch in fp64."""
    config = ClassifierConfig(dim=5, bucket=11, min_count=1, lr=0.3, epochs=40, word_ngrams=2)
    ours = fit(TINY, TINY_GOOD, config)
    inputs = torch.zeros(len(ours.table), 1, dtype=torch.float64)
    start = (2 / (3 * config.dim)) ** 0.5 / 2
    outputs = torch.tensor([[start], [-start]], dtype=torch.float64)
    descended(inputs, outputs, incidence(TINY, ours, config), config)
    assert ours.output == pytest.approx((outputs[0] - outputs[1]).item(), rel=1e-6)
    assert abs(ours.output - 2 * start) > 0.1  # it has learned something
    assert np.abs(ours.table - inputs.detach().numpy()[:, 0]).max() < 1e-5  # fp32


def test_a_wide_network_of_orthogonal_rows_goes_the_same_way() -> None:
    """What the trainer rests on: fastText's own network, and its error halves with the rate."""
    errors = []
    for epochs, lr in ((200, 0.2), (400, 0.1)):
        config = ClassifierConfig(dim=64, bucket=11, min_count=1, lr=lr, epochs=epochs,
                                  word_ngrams=2)  # fmt: skip
        ours = fit(TINY, TINY_GOOD, config)
        shares = incidence(TINY, ours, config)
        torch.manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
        inputs = rotation[: len(ours.table)] * (1 / (3 * config.dim)) ** 0.5
        outputs = torch.zeros(2, 64, dtype=torch.float64)
        descended(inputs, outputs, shares, config)
        wide = (inputs @ (outputs[0] - outputs[1])).detach().numpy()
        assert (shares @ wide > 0).tolist() == TINY_GOOD and np.abs(wide).max() > 3
        errors.append(np.abs(ours.table * ours.output - wide).max() / np.abs(wide).max())
    assert errors[0] < 0.05
    assert errors[1] < 0.6 * errors[0]


def test_the_library_loads_what_is_written(
    classifier: Classifier, prose: list[str], shuffled: list[str]
) -> None:
    model = fasttext.load_model(str(classifier.folder / "model.bin"))
    assert model.get_dimension() == 1 and sorted(model.get_labels()) == [
        "__label__neg", "__label__pos"
    ]  # fmt: skip
    assert [w.encode() for w in model.get_words()] == classifier.scorer.words
    texts = prose[:300] + shuffled[:300]
    theirs = classifier.score(texts, backend="reference")
    assert 0.05 < theirs.mean() < 0.95 and theirs.std() > 0.1
    assert np.abs(classifier.score(texts) - theirs).max() < 1e-5
    assert classifier.score(texts, exact=True).tolist() == theirs.tolist()


def test_the_vocabulary_is_the_library_s(
    prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    config = replace(SMALL, bucket=1000)
    for trainer in ("native", "fasttext"):
        train(prose[:80], shuffled[:80], replace(config, trainer=trainer), tmp_path / trainer)
    counts = []
    for trainer in ("native", "fasttext"):
        model = fasttext.load_model(str(tmp_path / trainer / "model.bin"))
        words, frequencies = model.get_words(include_freq=True)
        counts.append(dict(zip(words, frequencies.tolist(), strict=True)))
        assert frequencies.tolist() == sorted(frequencies.tolist(), reverse=True)
    assert counts[0] == counts[1] and counts[0]["</s>"] == 160


def test_f1_is_the_library_s(prose: list[str], shuffled: list[str], tmp_path: Path) -> None:
    """On text that neither saw, by seed; `experiments/trainer.py` asks more corpora."""
    texts, labels = prose[1::2] + shuffled[1::2], [True] * len(prose[1::2])
    labels += [False] * (len(texts) - len(labels))
    found: dict[str, list[tuple[float, float]]] = {"native": [], "fasttext": []}
    for seed in range(3):
        scores = {}
        for trainer in found:
            config = ClassifierConfig(dim=32, bucket=20_000, min_count=3, lr=0.5, epochs=5,
                                      seed=seed, trainer=trainer)  # fmt: skip
            made = train(prose[::2], shuffled[::2], config, tmp_path / f"{trainer}{seed}")
            scores[trainer] = made.score(texts)
            f1 = precision_recall_f1(scores[trainer], labels, 0.5).f1
            found[trainer].append((auc(scores[trainer], labels), f1))
        logits = [np.log(s.clip(1e-4, 1 - 1e-4) / (1 - s.clip(1e-4, 1 - 1e-4)))
                  for s in scores.values()]  # fmt: skip
        assert np.corrcoef(*logits)[0, 1] > 0.98
    ours, theirs = (np.mean(found[t], axis=0) for t in ("native", "fasttext"))
    assert theirs[1] > 0.9
    assert np.abs(ours - theirs).max() < 0.005, (ours, theirs)


def test_an_interrupted_training_goes_on(
    prose: list[str], shuffled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width_one, "_SLICE", 500)
    whole = train(prose[:50], shuffled[:50], SMALL, tmp_path / "whole")

    def stop_at(share: float):
        def progress(done: int, of: int) -> None:
            seen.append(done / of)
            if share <= done / of:
                raise KeyboardInterrupt

        return progress

    for share in (0.0, 0.3, 0.31, 0.9):  # in the first epoch, in the middle, at once again, late
        seen: list[float] = []
        with pytest.raises(KeyboardInterrupt):
            train(prose[:50], shuffled[:50], SMALL, tmp_path / "x", stop_at(share))
        assert [p.name for p in tmp_path.iterdir() if p.name != "whole"] == [".x.training"]
    seen = []
    # Another text does not take it for its own; the same goes on, with other threads too.
    other = fit([b"a b"] * 9 + [b"c"] * 9, [True] * 9 + [False] * 9, SMALL)
    again = fit([b"a b"] * 9 + [b"c"] * 9, [True] * 9 + [False] * 9, SMALL,
                _copy(tmp_path / ".x.training"))  # fmt: skip
    assert equal(other, again)
    (tmp_path / "copy").write_bytes(b"damaged")
    assert equal(other, fit([b"a b"] * 9 + [b"c"] * 9, [True] * 9 + [False] * 9, SMALL,
                            tmp_path / "copy"))  # fmt: skip
    made = train(prose[:50], shuffled[:50], SMALL, tmp_path / "x", stop_at(2))
    assert 0.9 <= seen[0] < seen[-1] == 1
    assert sha256(made.folder) == sha256(whole.folder)
    assert not (tmp_path / ".x.training").exists()


def _copy(path: Path) -> Path:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    return copy


def test_what_cannot_be_learned_is_an_error() -> None:
    for good in ([True, True], [False, False]):
        with pytest.raises(ValueError, match="only one of the two kinds"):
            fit([b"a", b"b"], good, SMALL)
    with pytest.raises(ValueError, match=r"no word comes 5 times in the 2 seeds"):
        fit([b"a", b"b"], [True, False], replace(SMALL, min_count=5))
    for backend in ("native", "numpy"):
        with pytest.raises(ValueError, match="diverged with lr=1e"):
            fit(TINY, TINY_GOOD, replace(SMALL, min_count=1, lr=1e200), backend=backend)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_words_are_counted(threads: int) -> None:
    """More words than the first tables hold, one document longer than all, more threads than it."""
    draw = random.Random(threads)
    documents = [
        b" ".join(b"%x" % int(draw.paretovariate(0.4)) for _ in range(draw.choice([0, 3, 40])))
        for _ in range(3000)
    ]
    documents.append(b" ".join(b"w%d" % i for i in range(90_000)))
    native = count_words(documents, 2, threads)
    plain = count_words(documents, 2, 1, "numpy")
    assert len(native.features) > 90_000 and END in native.words
    assert (native.words, native.counts) == (plain.words, plain.counts)
    assert native.starts.tolist() == plain.starts.tolist()
    for name in ("hash", "row"):
        assert (native.features[native.tokens][name] == plain.features[plain.tokens][name]).all()
    few = count_words([b"a b a"], 1, threads)
    assert (few.words, few.counts, few.starts.tolist()) == ([b"a", END, b"b"], [2, 1, 1], [0, 4])
