"""The report's section on the stage `heads`."""

from __future__ import annotations

from typing import Any

from minicpm4.reporting.blocks import DENSE, SPARSE, Figure, Section, Table, new_figure, svg


def section(name: str, metrics: dict[str, Any]) -> Section:
    """Loss by budget beside the scorers that need no training, and the memory curve."""
    losses, budgets, over = metrics["losses"], metrics["budgets"], metrics["overlap"]
    last = metrics["curve"][-1]
    smallest = min(range(len(budgets)), key=lambda b: budgets[b])
    best = min((n for n in losses if n not in ("full", "heads")), key=lambda n: losses[n][smallest])
    ours, theirs, full = (losses[n][smallest] for n in ("heads", best, "full"))
    return Section(
        name=name,
        title="Heads: which keys to keep",
        summary=(
            f"Small heads on {metrics['model']} learned from {metrics['trained']['tokens']:,} "
            f"tokens of the kept text which keys are looked at: by questions about facts strewn "
            f"into {metrics['settings']['facts']:.0%} of the windows, and where "
            f"{metrics['settings']['repeats']:.0%} are said twice. "
            f"{metrics['unseen']} windows that they did not see, made alike, were compressed to "
            f"{budgets[smallest]:.1%} of their entries: the last words then cost {ours:.3f} nats a "
            f"token, {theirs:.3f} with the best scorer without training ({best}), {full:.3f} with "
            "the full cache."
        ),
        headline=(
            f"{last['full'] / last['bounded']:.1f}×",
            f"smaller cache after {last['tokens']:,} tokens",
        ),
        blocks=[
            Table(
                ["scorer", "overlap", *(f"nats a token at {b:.1%}" for b in budgets)],
                [
                    [name, f"{over[name]:.3f}" if name in over else "",
                     *(f"{value:.4f}" for value in losses[name])]
                    for name in sorted(losses, key=lambda n: losses[n][smallest])
                ],
                "Overlap: of the tenth of entries that the window's end really looked at, the "
                "share that the scorer likes best. A few windows tell large differences only.",
            ),
            Figure(
                svg(_curve(metrics["curve"])),
                "Keys and values held while a text is read; the dotted line is budget + chunk.",
            ),
        ],
    )  # fmt: skip


def _curve(rows: list[dict[str, int]]):  # noqa: ANN202 - matplotlib is imported only to draw
    figure, axis = new_figure(height=2.6)
    tokens = [row["tokens"] for row in rows]
    for key, colour in (("full", DENSE), ("bounded", SPARSE)):
        axis.plot(tokens, [row[key] / 1e6 for row in rows], color=colour, label=key)
    axis.axhline(rows[0]["bound"] / 1e6, color="0.5", linestyle=":")
    axis.set_xlabel("tokens read")
    axis.set_ylabel("cache, MB")
    axis.legend()
    return figure
