"""The report: trend, sensitivity, laws, compression and every doubt about the data, on one page."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from densing.corollaries import DAYS_PER_YEAR, combined_doubling, compression
from densing.fitting import Sigmoid, hold_out
from densing.reference import Reference
from densing.reporting import plots
from densing.sensitivity import Headline
from densing.tables import ModelTable

MOORE_YEARS = 2.1  # chip price-performance doubles in this time (Epoch AI, as the paper uses it)


@dataclass(frozen=True)
class Ladder:
    """A reference ladder's data, for the plots of its laws.

    Attributes:
        reference: fitted to them.
        runs: `parameters`, `tokens`, `loss`. scores: `loss`, `score`.
        held: how many of the best scores are held out of the fit that the plot checks.
    """

    reference: Reference
    runs: Mapping[str, Any]
    scores: Mapping[str, Any]
    held: int


@dataclass(frozen=True)
class Section:
    """A titled part of the page; figures are SVG, everything else is escaped."""

    title: str
    text: str
    figures: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def report(
    table: ModelTable,
    found: Headline,
    *,
    ladder: Ladder | None = None,
    command: str = "densing report",
    title: str = "Capacity density",
) -> str:
    """The page as HTML text.

    Args:
        table: what the headline was made from; its problems are listed.
        found: the headline and its sensitivity.
        ladder: adds the loss and score laws with held-out points.
        command: what was typed, printed at the foot.
        title: of the page.
    """
    from jinja2 import Environment, StrictUndefined

    sections = [_trend(found), _sensitivity(found)]
    if ladder is not None:
        sections.append(_laws(ladder))
    arrows = _compression(table, found)
    if arrows is not None:
        sections.append(arrows)
    sections += [_models(found), _left_out(found), _problems(table)]
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = resources.files("densing.reporting").joinpath("template.html").read_text("utf-8")
    line = found.trend
    low, high = line.doubling_interval
    shortest, longest = found.range
    return engine.from_string(source).render(
        title=title,
        headline=(
            (f"{line.doubling_days:.0f} days", "doubling time, by the choices below"),
            (f"{low:.0f} – {number(high)}", f"{line.level:.0%} interval"),
            (f"{shortest:.0f} – {longest:.0f}", "by other choices"),
        ),
        sections=sections,
        command=command,
        version=importlib.metadata.version("minicpm4-densing"),
        source=table.source,
        data=line.data_sha256[:16],
    )


def _trend(found: Headline) -> Section:
    choices, line = found.densities.choices, found.trend
    correlation = found.densities.points.size_correlation
    warning = (
        " The densest models are the small ones: this is a trend of small models."
        if correlation < -0.5
        else ""
    )
    moore = (
        combined_doubling(line.doubling_days, MOORE_YEARS * DAYS_PER_YEAR)
        if line.doubling_days > 0
        else math.nan
    )
    return Section(
        "Density over time",
        f"{choices.scored_on.name}, {choices.basis} parameters, reference "
        f"{found.densities.reference_name}, models from {choices.since} on; "
        f"{line.estimator} through {len(line.points)} of {line.models} "
        f"models; A = {line.slope:.5f} a day, R² = {line.r_squared:.3f} in sample; "
        f"corr(ln density, ln N) = {correlation:+.2f}.{warning} With chips that double in "
        f"{MOORE_YEARS} years, what fits on a chip of one price doubles in {moore:.0f} days.",
        (plots.density_over_time(found),),
    )


def _sensitivity(found: Headline) -> Section:
    rows = tuple(
        (
            row.choice,
            row.value,
            number(row.doubling_days),
            "" if row.low is None else f"{number(row.low)} – {number(row.high)}",
            "" if row.r_squared is None else f"{row.r_squared:.3f}",
            str(row.models or ""),
            str(row.points or ""),
            row.note,
        )
        for row in found.sensitivity
    )
    return Section(
        "What other choices give",
        "One choice changed at a time. A number that survives only its own row is no finding.",
        (plots.sensitivity(found),),
        ("choice", "value", "days", "interval", "R²", "models", "on the line", "note"),
        rows,
    )


def _laws(ladder: Ladder) -> Section:
    loss = np.asarray(ladder.scores["loss"], float)
    score = np.asarray(ladder.scores["score"], float)
    held = np.zeros(len(loss), bool)
    text = "Loss from size and tokens, and score from loss, fitted to the ladder."
    if ladder.held:
        held[np.argsort(loss)[: ladder.held]] = True
        form = Sigmoid(floor=ladder.reference.score.d if ladder.reference.score.d > 0 else None)
        check = hold_out(form, {"loss": loss, "score": score}, held)
        text += (
            f" Fitted without the {ladder.held} best, the score law misses these by "
            f"{check.mean_absolute_error:.3f} on average."
        )
    flags = ladder.reference.fits.get("flags", [])
    if flags:
        text += " Flags: " + "; ".join(flags) + "."
    return Section(
        "The reference's two laws",
        text,
        (
            plots.scaling_curve(ladder.reference, dict(ladder.runs)),
            plots.loss_to_score(ladder.reference, loss, score, held),
        ),
    )


def _compression(table: ModelTable, found: Headline) -> Section | None:
    densities = {p.model.name: p.density.ratio or 0.0 for p in found.densities.placed}
    parents = {m.name: m.parent for m in table.models if m.parent}
    pairs = compression(densities, parents)
    if not pairs:
        return None
    denser = sum(p.ratio > 1 for p in pairs)
    return Section(
        "Compression",
        f"{denser} of {len(pairs)} models that were pruned or distilled are denser than the model "
        "they come from.",
        (plots.compression_arrows(pairs),),
        ("parent", "child", "density before", "after", "ratio"),
        tuple(
            (p.parent, p.child, f"{p.before:.2f}", f"{p.after:.2f}", f"{p.ratio:.2f}")
            for p in pairs
        ),
    )


def _models(found: Headline) -> Section:
    placed = sorted(found.densities.placed, key=lambda p: -(p.density.ratio or 0))
    return Section(
        "Models",
        "Densities with the interval that the reference's uncertainty and the benchmark's number "
        "of questions leave. * lies outside the sizes of the reference's own models.",
        (),
        ("model", "released", "parameters", "score", "density", "interval", "source of the score"),
        tuple(
            (
                p.model.name,
                str(p.model.released),
                f"{p.density.parameters / 1e9:.3g} B",
                f"{p.score:.1%}",
                f"{p.density.ratio:.2f}{'*' if p.density.extrapolated else ''}",
                f"{p.density.low:.2f} – {number(p.density.high)}"
                if p.density.low is not None
                else "",
                p.model.scores[found.densities.choices.scored_on.name].source,
            )
            for p in placed
        ),
    )


def _left_out(found: Headline) -> Section:
    return Section(
        "Left out",
        f"{len(found.densities.left_out)} models have no place on this plot, and why.",
        (),
        ("model", "reason"),
        found.densities.left_out,
    )


def _problems(table: ModelTable) -> Section:
    return Section(
        "Doubts about the data",
        f"{len(table.problems)} found in {table.source}.",
        (),
        ("kind", "model", "what", "left out"),
        tuple((p.kind, p.model, p.message, "yes" if p.excluded else "") for p in table.problems),
    )


def number(value: float | None) -> str:
    """Days or a density as a reader wants it."""
    if value is None:
        return "–"
    if math.isinf(value) or value > 99999:
        return "∞"
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"
