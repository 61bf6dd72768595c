"""Stage `clean`: learn what good text looks like from seeds, keep the good part of a raw pool.

The tool is `ultraclean` (Ultra-FineWeb, arXiv 2505.05427). What is measured here is what a filter
must be asked: how well it ranks sources it never saw, and whether a language model that had no
part in it finds the kept text easier than the dropped.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from minicpm4._files import atomic_path
from minicpm4.pipeline.models import model_identity, model_path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs
from minicpm4.pipeline.text import Passage, check_source, in_share, passages, rank, source_identity
from minicpm4.stages.measures import auc, by_source, examples, histogram, judge


class CleanConfig(StageConfig):
    """Keys of the stage `clean` in a pipeline's YAML."""

    good: list[str] = Field(min_length=1, description="sources of text that one would train on")
    poor: list[str] = Field(min_length=1, description="sources of text that one would not")
    seeds: list[str] = Field(
        min_length=2, description="sources the classifier learns from; it never sees the others"
    )
    seed_share: float = Field(default=0.4, gt=0, lt=1, description="share of their documents used")
    passage_chars: int = Field(default=2000, ge=200, description="documents are cut to this length")
    min_chars: int = Field(default=200, ge=0, description="shorter passages are dropped unread")
    max_passages: int = Field(default=0, ge=0, description="most passages of a source; 0 = all")
    dim: int = Field(default=256, ge=1, description="fastText: width of an embedding row")
    bucket: int = Field(default=2_000_000, ge=1, description="fastText: rows for word n-grams")
    lr: float = Field(default=0.1, gt=0, description="fastText's rate; few seeds need a larger one")
    epochs: int = Field(default=3, ge=1)
    min_count: int = Field(default=5, ge=1)
    threshold: float = Field(default=0.5, ge=0, le=1, description="keep what scores at least this")
    judge: str = Field(default="smollm2", description="model that compares kept and dropped text")
    judge_passages: int = Field(default=40, ge=2, description="how many of each it reads")

    @field_validator("seeds")
    @classmethod
    def _seeds_are_sources(cls, seeds: list[str], info: Any) -> list[str]:
        good, poor = info.data.get("good", []), info.data.get("poor", [])
        for name in seeds:
            if name not in [*good, *poor]:
                raise ValueError(f"{name!r} is neither in good nor in poor")
        if not set(seeds) & set(good) or not set(seeds) & set(poor):
            raise ValueError("name at least one good and one poor source")
        return seeds


def run(config: CleanConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Train the classifier, filter the pool, measure both."""
    with needs("ultraclean", "clean"):
        import ultraclean

    space.progress("reading the sources", 0.0)
    seeds, pool = _divide(config)
    pool_file = space.path / "pool.jsonl"
    if not pool_file.exists():
        _write_pool(pool_file, pool, config, space.seed)

    folder = space.path / "classifier"
    if not folder.exists():
        space.progress("training the classifier", 0.1)
        ultraclean.train(
            [p.text for p, _, good in seeds if good],
            [p.text for p, _, good in seeds if not good],
            ultraclean.ClassifierConfig(
                dim=config.dim,
                lr=config.lr,
                bucket=config.bucket,
                epochs=config.epochs,
                min_count=config.min_count,
                normaliser="ultrafine-words",
                seed=space.seed,
            ),
            folder,
        )
    classifier = ultraclean.Classifier.load(folder)

    space.progress("scoring the pool", 0.3)
    filtered = space.path / "filtered"
    report = ultraclean.filter_corpus(
        [pool_file],
        filtered,
        classifier,
        threshold=config.threshold,
        min_chars=config.min_chars,
        drop_duplicates=True,
    )

    space.progress("measuring", 0.5)
    kept, dropped = _read(filtered / "kept.jsonl"), _read(filtered / "rejected.jsonl")
    if not kept:
        raise ValueError(
            f"no passage of {report.total} scored at least {config.threshold}: lower threshold"
        )
    judged = space.once(
        "judge", lambda: judge(config.judge, config.judge_passages, kept, dropped, space)
    )
    space.write_metrics(
        {
            "pool": {
                "in": report.total,
                "kept": report.kept,
                "rejected": report.rejected,
                "malformed": report.malformed,
            },
            "seeds": {"good": sum(g for *_, g in seeds), "poor": sum(not g for *_, g in seeds)},
            "by_source": by_source(kept, dropped),
            "by_reason": dict(report.reasons),
            "auc": auc(kept, dropped, space.seed),
            "scores": histogram(kept, dropped),
            "judge": judged,
            "kept_characters": sum(len(r["text"]) for r in kept),
            "examples": examples(kept, dropped),
        }
    )


Labelled = tuple[Passage, str, bool]


def _divide(config: CleanConfig) -> tuple[list[Labelled], list[Labelled]]:
    """Seeds and pool, each as (passage, source, is that good); no document is in both."""
    seeds: list[Labelled] = []
    pool: list[Labelled] = []
    for name in [*config.good, *config.poor]:
        good = name in config.good
        found = list(passages(name, config.passage_chars))
        if config.max_passages and len(found) > config.max_passages:
            # Which ones is decided by their names: not always the first, and always the same.
            found = sorted(found, key=lambda p: rank(p.id, "take"))[: config.max_passages]
        for passage in found:
            is_seed = name in config.seeds and in_share(passage.id, config.seed_share, "seed")
            if is_seed and len(passage.text) >= config.min_chars:
                seeds.append((passage, name, good))
            elif not is_seed:
                pool.append((passage, name, good))
    return seeds, pool


def _write_pool(path: Path, pool: list[Labelled], config: CleanConfig, seed: int) -> None:
    """The pool in an order that mixes the sources, as a crawl does.

    What the evaluation needs to know of a passage goes along; the classifier sees the text alone.
    """
    mixed = sorted(pool, key=lambda item: item[0].id)
    random.Random(seed).shuffle(mixed)
    with atomic_path(path) as target, target.open("w", encoding="utf-8") as stream:
        for passage, name, good in mixed:
            record = {
                "id": passage.id,
                "source": passage.source,
                "text": passage.text,
                "from_good": good,
                "seen": name in config.seeds,
            }
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def estimate(config: CleanConfig, inputs: dict[str, Path]) -> Estimate:
    """Judging dominates time and memory; a classifier has a number for each of its rows."""
    table = config.bucket * 4
    return Estimate(
        seconds=20 + 0.6 * config.judge_passages * 2,
        memory_bytes=4 * table + 1_500_000_000,
        disk_bytes=2 * table + 60_000_000,
        detail=", ".join([*config.good, *config.poor]),
    )


def check(config: CleanConfig) -> None:
    """Every source and the judge must be there before anything runs."""
    for name in [*config.good, *config.poor]:
        check_source(name)
    model_path(config.judge)


def external(config: CleanConfig) -> dict[str, str]:
    """What the stage reads from outside the pipeline."""
    identities = {name: source_identity(name) for name in [*config.good, *config.poor]}
    return {**identities, config.judge: model_identity(config.judge)}


STAGE = Stage(
    name="clean",
    summary="learn what good text looks like, keep the good part of a raw pool",
    config=CleanConfig,
    run=run,
    estimate=estimate,
    inputs={},
    outputs={
        "kept": "filtered/kept.jsonl",
        "rejected": "filtered/rejected.jsonl",
        "classifier": "classifier",
        "metrics": "metrics.json",
    },
    sources=(
        "ultraclean",
        "minicpm4.stages.clean",
        "minicpm4.stages.measures",
        "minicpm4.pipeline.text",
    ),
    external=external,
    check=check,
)
