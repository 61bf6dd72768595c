"""The seed loop (Ultra-FineWeb §3.2): seeds → classifier → filtered sample → verify → new seeds.

Candidate seed pools are verified first, and those that help become the positives. Each round
trains a classifier, filters a sample with it, and verifies what it kept. A round that helps more
than the best before it lends its surest texts as new positives and its worst as new negatives; the
first that does not ends the loop, and the classifier of the best round is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ultraclean._files import write_json
from ultraclean.classifier import Classifier
from ultraclean.config import ClassifierConfig
from ultraclean.evaluate import threshold_for_budget
from ultraclean.processes import launched
from ultraclean.training import train
from ultraclean.verification import Recipe, Verification, verify


@dataclass(frozen=True)
class Round:
    """What one round did."""

    positives: int
    negatives: int
    kept: int
    """Texts of the sample that the classifier kept."""
    threshold: float
    gain: float
    error: float
    verdict: str


@dataclass
class LoopReport:
    """What the loop found.

    Attributes:
        seeds: what verifying the pools themselves showed.
        accepted: pools whose text became the first positives.
        rounds: one after the other.
        best: folder of the best round's classifier; None if no round helped.
        stopped: why.
    """

    seeds: dict[str, Any]
    accepted: list[str]
    rounds: list[Round] = field(default_factory=list)
    best: str | None = None
    stopped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def loop(
    base: str | Path,
    pools: Mapping[str, Iterable[str]],
    negatives: Iterable[str],
    sample: Iterable[str],
    default: Iterable[str],
    evaluations: Mapping[str, Iterable[str]],
    output: str | Path,
    *,
    config: ClassifierConfig,
    recipe: Recipe,
    keep: float = 0.3,
    most_rounds: int = 3,
    borrowed: float = 0.2,
    progress: Callable[[str], None] = lambda what: None,
) -> LoopReport:
    """Find a classifier whose choice helps a language model, or say that none was found.

    Goes on after a kill: verified arms and trained classifiers are kept in `output`.

    Args:
        base, default, evaluations, recipe: as for `verify`.
        pools: name -> texts of a candidate seed pool.
        negatives: raw text.
        sample: of the corpus to be filtered; what the classifier keeps of it is verified.
        output: folder.
        config: how classifiers are trained.
        keep: share of the sample's characters to keep, in (0, 1].
        most_rounds: at most.
        borrowed: share of the kept (and as many of the worst) that joins the seeds after a round.
        progress: called with what is being done.

    Raises:
        ValueError: as `verify` and `train`.
    """
    folder, processes = Path(output), launched()
    named = {name: list(texts) for name, texts in pools.items()}
    judges = {name: list(texts) for name, texts in evaluations.items()}
    mix, texts, bad = list(default), [t for t in sample if t.strip()], list(negatives)
    if not processes.writes:
        progress = _silent
    progress("verifying the seed pools")
    first = verify(base, named, mix, judges, recipe, folder / "seeds")
    report = LoopReport(first.to_dict(), first.accepted)
    if not first.accepted:
        # Noise may hide a small gain; the best by mean still begins the loop, and it is said.
        best = max(named, key=lambda name: first.of(name).gain)
        report.accepted = [best]
        report.stopped = "no seed pool's gain is more than noise; the best by mean was taken. "
    good = [text for name in report.accepted for text in named[name]]
    highest = 0.0
    for number in range(most_rounds):
        progress(f"round {number + 1}")
        path = folder / f"round{number + 1}"
        classifier = _trained(good, bad, config, path / "classifier")
        scores = classifier.score(texts)
        threshold = threshold_for_budget(scores, [len(t) for t in texts], keep)
        kept = [t for t, s in zip(texts, scores, strict=True) if s >= threshold]
        result: Verification = verify(base, {"kept": kept}, mix, judges, recipe, path / "verify")
        found = result.of("kept")
        report.rounds.append(Round(len(good), len(bad), len(kept), threshold, found.gain,
                                   found.error, found.verdict))  # fmt: skip
        _save(folder, report)
        if found.verdict != "helps" or found.gain <= highest:
            report.stopped += f"round {number + 1} gave no further gain"
            break
        highest, report.best = found.gain, str(path / "classifier")
        order = np.argsort(-scores, kind="stable")
        count = max(1, int(borrowed * len(kept)))
        good = good + [texts[i] for i in order[:count]]
        bad = bad + [texts[i] for i in order[::-1][:count]]
    else:
        report.stopped += f"{most_rounds} rounds are done"
    _save(folder, report)
    return report


def _silent(what: str) -> None:
    """One process's progress is enough."""


def _save(folder: Path, report: LoopReport) -> None:
    if launched().writes:
        write_json(folder / "loop.json", report.to_dict())


def _trained(good: list[str], bad: list[str], config: ClassifierConfig, path: Path) -> Classifier:
    """A classifier trained before, if its texts and settings were these, or a new one."""

    def make() -> None:  # on one process; the others wait
        try:
            found = Classifier.load(path)
            counts = found.manifest["texts"]
            same = replace(found.config, tokenizer=config.tokenizer) == config
            if same and counts["pos"] <= len(good) and counts["neg"] <= len(bad):
                return
        except (FileNotFoundError, ValueError, KeyError):
            pass
        train(good, bad, config, path)

    launched().agree(make)
    return Classifier.load(path)
