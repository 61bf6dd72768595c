"""From a table of models to dated densities: every choice explicit, everyone left out named."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np

from densing.benchmarks import Benchmark, find_benchmark
from densing.capacity_density import Density, OutOfRange, effective_parameters, interval
from densing.checks import without_duplicates
from densing.curated import curated_table
from densing.densing_law import LLAMA_1, Points, to_days
from densing.reference import AnyReference, FamilyReference
from densing.reference_models import fit_reference
from densing.tables import Model, ModelTable

Basis = Literal["total", "active"]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a trend depends on.

    Args:
        basis: count "total" or "active" parameters. There is no default: for mixtures of experts
            the two differ tenfold.
        benchmark: name of the scores to use.
        anchor: family whose members have density around 1, unless a reference is given.
        margin: a score below chance + margin · (1 - chance) is left out: there, one question more
            or less moves ln ρ by as much as a year of progress.
        min_parameters: smaller models are left out.
        since, until: releases outside are left out.
        zero: the date of day 0.
    """

    basis: Basis
    benchmark: str | Benchmark = "MMLU"
    anchor: str = "LLaMA"
    margin: float = 0.05
    min_parameters: float = 0.0
    since: date = LLAMA_1
    until: date = date.max
    zero: date = LLAMA_1

    def __post_init__(self) -> None:
        """Refuse what is no choice."""
        if self.basis not in ("total", "active"):
            raise ValueError(f"basis must be 'total' or 'active', got {self.basis!r}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must lie in [0, 1), got {self.margin}")
        if self.since > self.until:
            raise ValueError(f"since {self.since} lies after until {self.until}")

    @property
    def scored_on(self) -> Benchmark:
        """The benchmark itself."""
        if isinstance(self.benchmark, Benchmark):
            return self.benchmark
        return find_benchmark(self.benchmark)


@dataclass(frozen=True)
class Placed:
    """A model with its density."""

    model: Model
    score: float
    density: Density


@dataclass(frozen=True)
class DatedDensities:
    """Models of a table that have a density and a date, and why the others have not.

    Attributes:
        points: for `trend`. placed: the same models, with intervals.
        left_out: (model, reason), in the table's order.
        reference, choices: what it was made with.
    """

    points: Points
    placed: tuple[Placed, ...]
    left_out: tuple[tuple[str, str], ...]
    reference: AnyReference
    choices: Choices

    @property
    def reference_name(self) -> str:
        """The anchor family, and where it is from if not from the table; or "ladder"."""
        return self.reference.family if isinstance(self.reference, FamilyReference) else "ladder"


def anchor_reference(table: ModelTable, choices: Choices, draws: int = 500) -> AnyReference:
    """The family `choices.anchor` of a table as the reference.

    A table without that family, such as your own results, takes it from the table that ships; the
    reference's `family` then says so.

    Raises:
        ValueError: no such family, or fewer than two of its models have size and score.
    """
    benchmark, name = choices.scored_on, choices.anchor
    try:
        anchors = without_duplicates(table).family(name)
    except ValueError as error:
        try:
            anchors = curated_table().family(name)
        except ValueError:
            raise error from None
        name = f"{name} (from the table that ships)"
    members = [m for m in anchors if count(m, choices.basis) and benchmark.name in m.scores]
    if len(members) < 2:
        raise ValueError(
            f"{len(members)} models of the family {name} have a size and a score on "
            f"{benchmark.name}: an anchor needs at least 2"
        )
    return fit_reference(
        family={
            "parameters": [count(m, choices.basis) for m in members],
            "score": [m.scores[benchmark.name].value for m in members],
        },
        chance=benchmark.chance,
        name=name,
        draws=draws,
    )


def count(model: Model, basis: Basis) -> float | None:
    """N of a model; for a dense one, active parameters are all."""
    if basis == "total":
        return model.parameters
    if model.active_parameters:
        return model.active_parameters
    return None if model.sparse else model.parameters


def dated_densities(
    table: ModelTable,
    choices: Choices,
    reference: AnyReference | None = None,
    *,
    level: float = 0.95,
) -> DatedDensities:
    """Density of every model of a table that can have one.

    Args:
        table: models with scores; duplicates count once.
        choices: see `Choices`.
        reference: `anchor_reference(table, choices)` by default.
        level: of the intervals.

    Raises:
        ValueError: no reference can be fitted.
    """
    benchmark = choices.scored_on
    found = reference if reference is not None else anchor_reference(table, choices)
    unique = without_duplicates(table)
    left_out: list[tuple[str, str]] = []
    kept: list[Model] = []
    for model in unique.models:
        reason = _why_not(model, choices, benchmark)
        if reason:
            left_out.append((model.name, reason))
        else:
            kept.append(model)
    scores = np.array([m.scores[benchmark.name].value for m in kept])
    sizes = np.array([count(m, choices.basis) for m in kept], np.float64)
    effective = effective_parameters(scores, found)
    low, high = interval(scores, found, benchmark.questions, level)
    placed, inside = [], []
    for i, model in enumerate(kept):
        if effective.status[i]:
            why = OutOfRange(int(effective.status[i]))
            left_out.append((model.name, f"its score is {why.name.lower()} the reference's range"))
            continue
        inside.append(i)
        value = float(effective.parameters[i])
        placed.append(
            Placed(
                model,
                float(scores[i]),
                Density(
                    float(sizes[i]),
                    value,
                    value / float(sizes[i]),
                    None if low is None else float(low[i] / sizes[i]),
                    None if high is None else float(high[i] / sizes[i]),
                    level,
                    None,
                    bool(effective.extrapolated[i]),
                ),
            )
        )
    points = Points(
        tuple(p.model.name for p in placed),
        tuple(p.model.family or p.model.name for p in placed),
        to_days([p.model.released for p in placed if p.model.released], choices.zero),
        np.log([p.density.ratio or 0.0 for p in placed]),
        np.log(sizes[inside]),
        scores[inside],
        choices.zero,
    )
    return DatedDensities(points, tuple(placed), tuple(left_out), found, choices)


def _why_not(model: Model, choices: Choices, benchmark: Benchmark) -> str | None:
    score = model.scores.get(benchmark.name)
    size = count(model, choices.basis)
    least = benchmark.chance + choices.margin * (1 - benchmark.chance)
    if score is None:
        return f"no score on {benchmark.name}"
    if size is None:
        return "active parameters unknown" if model.sparse else "size unknown"
    if model.released is None:
        return "release date unknown"
    if not choices.since <= model.released <= choices.until:
        return f"released on {model.released}, outside {choices.since} to {choices.until}"
    if size < choices.min_parameters:
        return f"{size:.3g} parameters, below the minimum of {choices.min_parameters:.3g}"
    if score.value < least:
        return f"score {score.value:.1%} too near chance (below {least:.1%})"
    return None
