"""The report's section on the stage `clean`."""

from __future__ import annotations

from typing import Any

from minicpm4.reporting.blocks import (
    GOOD,
    POOR,
    Figure,
    Paragraph,
    Samples,
    Section,
    Table,
    new_figure,
    svg,
)


def section(name: str, metrics: dict[str, Any]) -> Section:
    """What was kept, how well the classifier ranks, and what an independent judge says."""
    pool, judge = metrics["pool"], metrics["judge"]
    kept, dropped = judge["kept"]["nats_per_byte"], judge["dropped"]["nats_per_byte"]
    noise = (judge["kept"]["standard_error"] ** 2 + judge["dropped"]["standard_error"] ** 2) ** 0.5
    verdict = (
        f"{judge['model']}, which had no part in the choice, needs {kept:.3f} nats per byte on "
        f"kept text and {dropped:.3f} on dropped (difference {dropped - kept:+.3f} ± {noise:.3f})"
    )
    if dropped - kept <= 2 * noise:
        verdict += ": within the noise of this many passages, or the wrong way round"
    return Section(
        name=name,
        title="Clean: what good text looks like",
        summary=(
            f"A fastText classifier learned from {metrics['seeds']['good']} good and "
            f"{metrics['seeds']['poor']} poor passages, then scored a pool of {pool['in']}. "
            f"It kept {pool['kept']} and dropped {pool['rejected']}."
        ),
        headline=(f"{pool['kept'] / pool['in']:.0%}", f"kept of {pool['in']} passages"),
        blocks=[
            Figure(svg(_scores(metrics)), "Score of the passages in the pool, by kind of source."),
            Table(
                ["source", "kind", "in the seeds", "kept", "dropped", "share kept"],
                [
                    [
                        row["source"],
                        "good" if row["good"] else "poor",
                        row["seen"],
                        row["kept"],
                        row["dropped"],
                        f"{row['share_kept']:.0%}",
                    ]
                    for row in metrics["by_source"]
                ],
                "The pool by source. No document of the pool was among the seeds.",
            ),
            Table(
                ["reason", "passages"],
                sorted(metrics["by_reason"].items()),
                "Why passages were dropped.",
            ),
            Table(
                ["AUC on", "value", "95 % interval", "passages"],
                [
                    [kind, auc["value"], f"{auc['low']:.3f} – {auc['high']:.3f}", auc["passages"]]
                    for kind, auc in metrics["auc"].items()
                ],
                "Area under the ROC curve, good sources against poor. The row that counts is the "
                "one on sources the classifier never saw.",
            ),
            Paragraph(verdict + "."),
            Samples(
                [
                    (f"{kind} · {row['source']} · score {row['score']:.3f}", row["text"])
                    for kind, rows in metrics["examples"].items()
                    for row in rows
                ],
                "Passages at the ends of the scale and beside the threshold (their first 400 "
                "characters).",
            ),
        ],
    )


def _scores(metrics: dict[str, Any]):  # noqa: ANN202 - matplotlib is imported only to draw
    figure, axis = new_figure()
    edges = [i / 20 for i in range(21)]
    for kind, counts in metrics["scores"].items():
        total = max(1, sum(counts))
        axis.stairs(
            [count / total for count in counts],
            edges,
            label=kind,
            color=GOOD if kind.startswith("good") else POOR,
            linestyle="-" if kind.endswith(", seen") else "--",
            linewidth=1.6,
        )
    axis.set(xlabel="score", ylabel="share of passages", xlim=(0, 1))
    axis.legend(frameon=False)
    return figure
