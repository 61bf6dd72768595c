"""The report's section on the stage `verify`."""

from __future__ import annotations

from typing import Any

from minicpm4.reporting.blocks import Paragraph, Section, Table


def section(name: str, metrics: dict[str, Any]) -> Section:
    """The gain with its error, the losses behind it, and what it cost."""
    gain, error, ledger = metrics["gain"], metrics["error"], metrics["ledger"]
    arms = metrics["losses"]
    seeds = len(arms["control"]["good text"])
    share = ledger["share_of_scratch"]
    return Section(
        name=name,
        title="Verify: does the kept text help?",
        summary=(
            f"A model of {ledger['weights'] / 1e6:.1f}M weights, nearly trained on the raw pool, "
            f"was annealed on {metrics['settings']['candidate']:.0%} kept text, and on the pool "
            f"alone. On held-out good text the kept text gains {gain:+.4f} ± {error:.4f} bits per "
            f"byte over {seeds} seeds: {metrics['verdict']}."
        ),
        headline=(f"{gain:+.3f} bits", f"per byte gained by the kept text: {metrics['verdict']}"),
        blocks=[
            Table(
                ["arm", *(f"seed {i}" for i in range(seeds))],
                [[arm, *(f"{v:.4f}" for v in row["good text"])] for arm, row in arms.items()],
                "Bits per byte on good text that no arm was trained on.",
            ),
            Paragraph(
                f"Cost: {ledger['tokens_trained']:,} tokens, {share:.1%} of training each arm "
                "from scratch."
            ),
        ],
    )
