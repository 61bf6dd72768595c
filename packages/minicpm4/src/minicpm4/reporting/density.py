"""The report's section on the stage `density`."""

from __future__ import annotations

from datetime import date
from typing import Any

from minicpm4.reporting.blocks import (
    DENSE,
    SPARSE,
    TERNARY,
    Figure,
    Paragraph,
    Section,
    Table,
    new_figure,
    svg,
)


def section(name: str, metrics: dict[str, Any]) -> Section:
    """The trend with its sensitivity table, and where the pipeline's own models stand."""
    trend, own = metrics["trend"], metrics["own"]
    line, choices = trend["trend"], trend["choices"]
    low, high = line["doubling_interval"]
    shortest, longest = trend["range"]
    until = "∞" if high is None else f"{high:.0f}"
    flags = f" Flags of the fit: {'; '.join(metrics['flags'])}." if metrics["flags"] else ""
    return Section(
        name=name,
        title="Density: how much model for its size",
        summary=(
            f"The densest open model of its day doubled its density every "
            f"{line['doubling_days']:.0f} days on {choices['benchmark']} (interval {low:.0f} to "
            f"{until}); other choices give {shortest:.0f} to {longest:.0f}."
        ),
        headline=(
            f"{line['doubling_days']:.0f} days",
            f"density doubles; {shortest:.0f} – {longest:.0f} by other choices",
        ),
        blocks=[
            Figure(
                svg(_trend(trend)),
                f"Densities of published models, {choices['basis']} parameters, reference "
                f"{choices['anchor']}; the line is the {line['estimator']}.",
            ),
            Table(
                ["choice", "value", "doubling, days", "interval", "models", "on the line"],
                [
                    [
                        row["choice"],
                        row["value"],
                        row["doubling_days"],
                        _interval(row["low"], row["high"]),
                        row["models"] or None,
                        row["points"] or None,
                    ]
                    for row in trend["sensitivity"]
                ],
                "One choice changed at a time.",
            ),
            Figure(
                svg(_ladder(metrics)),
                f"Conditional loss of a ladder of {len(metrics['runs'])} tiny models of one recipe "
                f"on {metrics['pairs']} held-out beginnings and continuations, and its law; "
                "dashed, extrapolated to the tokens that the pipeline's models saw (triangles).",
            ),
            Table(
                ["model", "parameters", "nats per byte", "effective parameters", "density",
                 "interval"],
                [
                    [
                        row["name"],
                        row["model_parameters"],
                        row["nats_per_byte"],
                        _size(row, metrics["reach"]),
                        row["density"],
                        _interval(*(row["interval"] or (None, None))),
                    ]
                    for row in own
                ],
                "Effective parameters: the size at which the ladder's law gives that loss after "
                f"{metrics['tokens'] / 1e6:.1f} M tokens; > and < where that is further than a "
                "factor of 10 from the ladder's own models.",
            ),
            Paragraph(
                "These densities are relative to the ladder, not to the models above: losses on "
                "this text say nothing about benchmarks. What they compare is the pipeline's own "
                "models with each other." + flags
            ),
        ],
    )  # fmt: skip


def _size(row: dict[str, Any], reach: list[float]) -> str:
    if row["beyond"]:
        above = row["beyond"] == "above"
        return f"{'>' if above else '<'} {reach[above] / 1e6:.3g} M"
    return f"{row['effective_parameters'] / 1e6:.3g} M"


def _interval(low: float | None, high: float | None) -> str:
    if low is None:
        return ""

    def show(value: float | None) -> str:
        if value is None or value > 99999:
            return "∞"
        return f"{value:.0f}" if value >= 10 else f"{value:.2f}"

    return f"{show(low)} – {show(high)}"


def _trend(trend: dict[str, Any]):  # noqa: ANN202 - matplotlib is imported only to draw
    figure, axis = new_figure(height=3.6)
    points = set(trend["trend"]["points"])
    for chosen, colour in ((False, "#9aa4ad"), (True, DENSE)):
        rows = [m for m in trend["models"] if (m["name"] in points) == chosen]
        axis.scatter(
            [date.fromisoformat(m["released"]) for m in rows],
            [m["density"] for m in rows],
            s=18 if chosen else 10,
            color=colour,
            label="on the line" if chosen else "models",
        )
    days = [date.fromisoformat(row[0]) for row in trend["band"]]
    axis.plot(days, [row[2] for row in trend["band"]], color=DENSE)
    axis.fill_between(
        days,
        [row[1] for row in trend["band"]],
        [row[3] for row in trend["band"]],
        color=DENSE,
        alpha=0.15,
        linewidth=0,
    )
    axis.set(yscale="log", xlabel="released", ylabel="density")
    axis.legend(frameon=False)
    figure.autofmt_xdate()
    return figure


def _ladder(metrics: dict[str, Any]):  # noqa: ANN202
    figure, axis = new_figure(height=3.4)
    runs, law = metrics["runs"], metrics["law"]["constants"]
    tokens = sorted({r["tokens"] for r in runs})
    sizes = [r["parameters"] for r in runs] + [r["model_parameters"] for r in metrics["own"]]
    low, high = min(sizes) * 0.8, max(sizes) * 1.2
    grid = [low * (high / low) ** (i / 60) for i in range(61)]

    def loss(n: float, d: float) -> float:
        return law["a"] * n ** -law["alpha"] + law["b"] * d ** -law["beta"]

    for index, d in enumerate([*tokens, metrics["tokens"]]):
        own = index == len(tokens)
        axis.plot(
            grid,
            [loss(n, d) for n in grid],
            color=SPARSE if own else DENSE,
            alpha=1.0 if own else 0.35 + 0.6 * index / len(tokens),
            linestyle="--" if own else "-",
            linewidth=1,
            label=f"{d / 1e6:.3g} M tokens",
        )
        here = [r for r in runs if r["tokens"] == d]
        axis.plot([r["parameters"] for r in here], [r["nats_per_byte"] for r in here], "o",
                  color=DENSE, markersize=3)  # fmt: skip
    for index, row in enumerate(metrics["own"]):
        axis.plot(row["model_parameters"], row["nats_per_byte"], "^", color=TERNARY, markersize=6)
        axis.annotate(row["name"], (row["model_parameters"], row["nats_per_byte"]), fontsize=7,
                      textcoords="offset points", xytext=(6, (-9, 4)[index % 2]))  # fmt: skip
    axis.set(xscale="log", xlabel="parameters", ylabel="nats per byte of answer")
    axis.legend(frameon=False, fontsize=7)
    return figure
