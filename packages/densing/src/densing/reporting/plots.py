"""The plots people expect of densities, as SVG text. matplotlib is imported to draw, not before."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from densing.corollaries import Compression
from densing.densing_law import to_date
from densing.reference import Reference
from densing.sensitivity import Headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN, RED = "#3b6ea8", "#d1772a", "#9aa4ad", "#3b8a5a", "#b0413e"


def svg(figure: Figure) -> str:
    """A figure as an inline `<svg>` element, the same bytes for the same drawing."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "densing", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def axes(width: float = 8.0, height: float = 4.2) -> tuple[Figure, Axes]:
    """An empty figure with one axis, drawn without a window system."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(width, height))
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axis


def _plain_log(axis: Axes) -> None:
    """Plain numbers at 1, 2 and 5 on a logarithmic x axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def density_over_time(found: Headline, labels: int = 14) -> str:
    """Densities by release date on a logarithmic axis, the trend with its band, labels."""
    figure, axis = axes(9.0, 5.0)
    points, line = found.densities.points, found.trend
    dates = [to_date(d, points.zero) for d in points.days]
    density = np.exp(points.log_density)
    on_line = np.isin(points.names, line.points)
    for placed, day in zip(found.densities.placed, dates, strict=True):
        low, high = placed.density.low, placed.density.high
        if low and high and math.isfinite(high):
            axis.plot([day, day], [low, high], color=GREY, alpha=0.35, linewidth=0.8, zorder=1)
    axis.scatter(
        np.array(dates)[~on_line], density[~on_line], s=16, color=GREY, label="models", zorder=2
    )
    axis.scatter(
        np.array(dates)[on_line], density[on_line], s=30, color=BLUE, zorder=3,
        label=f"on the line ({line.estimator})",
    )  # fmt: skip
    grid = np.linspace(points.days.min(), points.days.max(), 80)
    when = [to_date(d, points.zero) for d in grid]
    axis.plot(
        when, np.exp(line.slope * grid + line.intercept), color=BLUE, linewidth=1.6,
        label=f"doubles in {line.doubling_days:.0f} days",
    )  # fmt: skip
    low, high = line.band(grid)
    axis.fill_between(
        when, np.exp(low), np.exp(high), color=BLUE, alpha=0.15, linewidth=0,
        label=f"{line.level:.0%} band",
    )  # fmt: skip
    # The last of the records are what people look for.
    order = np.flatnonzero(on_line)[np.argsort(points.days[on_line])][-labels:]
    for place, i in enumerate(order):
        axis.annotate(
            points.names[i].split("/")[-1], (dates[i], density[i]), fontsize=7,
            textcoords="offset points", xytext=(4, 5 if place % 2 else -9),
        )  # fmt: skip
    axis.set(yscale="log", ylabel="density (effective / real parameters)", xlabel="released")
    # Intervals may reach out of range; the plot is of the models.
    axis.set_ylim(density.min() / 3, max(density.max(), float(np.exp(high).max())) * 3)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.autofmt_xdate()
    return svg(figure)


def sensitivity(found: Headline) -> str:
    """Doubling time by every other choice, with intervals, the headline as a line."""
    rows = [r for r in found.sensitivity if r.doubling_days and r.doubling_days > 0]
    figure, axis = axes(8.0, 0.8 + 0.24 * len(rows))
    longest = max(r.doubling_days or 0 for r in rows) * 1.5
    for place, row in enumerate(rows):
        low = row.low if row.low and row.low > 0 else row.doubling_days
        high = min(row.high or longest, longest) if row.high else row.doubling_days
        axis.plot([low, high], [place, place], color=GREY, linewidth=2, alpha=0.7)
        axis.plot(row.doubling_days, place, "o", color=ORANGE, markersize=4)
    axis.axvline(found.trend.doubling_days, color=BLUE, linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{r.choice}: {r.value}" for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="doubling time, days")
    _plain_log(axis)
    return svg(figure)


def compression_arrows(found: Sequence[Compression]) -> str:
    """From each parent's density to its compressed child's."""
    figure, axis = axes(7.0, 0.9 + 0.4 * len(found))
    for place, pair in enumerate(found):
        colour = GREEN if pair.ratio > 1 else RED
        axis.annotate(
            "", (pair.after, place), (pair.before, place),
            arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6},
        )  # fmt: skip
        axis.plot([pair.before, pair.after], [place, place], "o", color=colour, markersize=3)
    axis.set_yticks(range(len(found)), [f"{p.parent} → {p.child}" for p in found], fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="density", ylim=(len(found) - 0.4, -0.6))
    _plain_log(axis)
    return svg(figure)


def loss_to_score(
    reference: Reference,
    loss: np.ndarray,
    score: np.ndarray,
    held: np.ndarray,
) -> str:
    """The score law through the points it was fitted to, and the held-out ones as triangles."""
    figure, axis = axes(6.4, 3.8)
    grid = np.linspace(loss.min() - 0.05 * np.ptp(loss), loss.max() + 0.05 * np.ptp(loss), 200)
    if reference.draws is not None:
        lines = np.array([_score(row, grid) for row in reference.draws[:200]])
        low, high = np.quantile(lines, [0.025, 0.975], axis=0)
        axis.fill_between(grid, low, high, color=BLUE, alpha=0.15, linewidth=0, label="95% band")
    axis.plot(grid, reference.score(grid), color=BLUE, label="score law")
    axis.scatter(loss[~held], score[~held], s=18, color=BLUE, label="fitted")
    if held.any():
        axis.scatter(loss[held], score[held], s=30, marker="^", color=ORANGE, label="held out")
    axis.set(xlabel="conditional loss", ylabel="score")
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8)
    return svg(figure)


def _score(constants: np.ndarray, loss: np.ndarray) -> np.ndarray:
    c, gamma, l, d = constants[5:]
    return c / (1 + np.exp(np.clip(-gamma * (loss - l), None, 700))) + d


def scaling_curve(reference: Reference, runs: dict[str, Any]) -> str:
    """Loss of the ladder's runs by compute, a line for each model size."""
    figure, axis = axes(6.4, 3.8)
    n, d, loss = (np.asarray(runs[k], float) for k in ("parameters", "tokens", "loss"))
    sizes = np.unique(n)
    shades = np.linspace(0.35, 1.0, len(sizes))
    for size, shade in zip(sizes, shades, strict=True):
        at = n == size
        order = np.argsort(d[at])
        flops = 6 * size * d[at][order]
        label = f"{size / 1e6:.3g} M" if size < 1e9 else f"{size / 1e9:.3g} B"
        axis.plot(flops, loss[at][order], "o", color=BLUE, alpha=shade, markersize=4, label=label)
        line = np.geomspace(d[at].min(), max(d[at].max(), 1.01 * d[at].min()), 40)
        axis.plot(6 * size * line, reference.loss(size, line), color=BLUE, alpha=shade, lw=1)
    axis.set(xscale="log", xlabel="training compute 6·N·D, FLOP", ylabel="conditional loss")
    axis.legend(frameon=False, fontsize=7, title="parameters", title_fontsize=7)
    return svg(figure)
