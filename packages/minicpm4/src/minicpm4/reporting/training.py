"""The report's sections on the stages `pretrain` and `ternary`."""

from __future__ import annotations

from typing import Any

from minicpm4.reporting.blocks import (
    DENSE,
    TERNARY,
    Figure,
    Section,
    Table,
    new_figure,
    svg,
)


def pretrain(name: str, metrics: dict[str, Any], timings: dict[str, Any]) -> Section:
    """The model, its data, and its loss curve."""
    last = metrics["validation"][-1]
    return Section(
        name=name,
        title="Pretrain: a small MiniCPM4 on the kept text",
        summary=(
            f"{metrics['parameters'] / 1e6:.1f} M parameters (preset {metrics['preset']}), "
            f"{metrics['tokens_seen'] / 1e6:.1f} M tokens seen of a corpus of "
            f"{metrics['tokens']['train'] / 1e6:.2f} M, warm-up – stable – decay."
        ),
        headline=(f"{last['per_byte']:.3f}", "nats per byte, held-out text"),
        blocks=[
            Figure(svg(_curve(metrics)), "Loss in nats per token; dotted, the learning rate."),
            Table(
                ["step", "validation loss, nats per token", "nats per byte"],
                [[row["step"], row["loss"], row["per_byte"]] for row in metrics["validation"]],
                "Held-out documents, never trained on.",
            ),
            Table(
                ["what", "value"],
                [
                    ["bytes per token of its own BPE", metrics["bytes_per_token"]],
                    ["held-out tokens", metrics["tokens"]["validation"]],
                    ["training tokens per second", timings["tokens_per_second"]],
                ],
            ),
        ],
    )


def ternary(name: str, metrics: dict[str, Any], full: dict[str, Any] | None) -> Section:
    """Three losses on the same text, the two curves side by side, and what packing saves."""
    loss, size = metrics["loss"], metrics["bytes"]
    gap = loss["ternary QAT"] / loss["full precision"] - 1
    return Section(
        name=name,
        title="Ternary: the same budget, its last part as QAT",
        summary=(
            f"From step {metrics['branch_step']} of {metrics['steps']} on, every matrix in the "
            f"layers has values {{−a, 0, a}} with one a for {metrics['group_size']} weights. "
            f"{metrics['zero_share']:.0%} of them are zero at the end."
        ),
        headline=(f"{gap:+.1%}", "loss of ternary against full precision"),
        blocks=[
            Figure(
                svg(_two_curves(metrics, full)),
                "Validation loss of both runs. They are one run up to the branch; QAT then begins "
                "with a new warm-up.",
            ),
            Table(
                ["model", "nats per token", "nats per byte"],
                [[kind, loss[kind], metrics["loss_per_byte"][kind]] for kind in loss],
                "The same held-out text. The ternary model was read back from its packed file; "
                "'without training' cuts the full-precision model to ternary and does no more.",
            ),
            Table(
                ["file", "bytes", "share of bf16"],
                [
                    ["whole model, bf16", size["bf16"], "100 %"],
                    ["whole model, packed", size["packed"], f"{size['packed'] / size['bf16']:.0%}"],
                    ["ternary matrices, bf16", size["matrices bf16"], "100 %"],
                    [
                        f"ternary matrices, packed ({metrics['codec']})",
                        size["matrices packed"],
                        f"{size['matrices packed'] / size['matrices bf16']:.1%}",
                    ],
                ],
                "Embedding and norms stay in bf16. In a model this small the embedding is a third "
                "of all parameters; in MiniCPM4-8B embedding and head are a fourteenth.",
            ),
        ],
    )


def _curve(metrics: dict[str, Any]):  # noqa: ANN202 - matplotlib is imported only to draw
    figure, axis = new_figure(height=3.4)
    steps, losses, rates = zip(*metrics["train"], strict=True)
    axis.plot(steps, losses, color=DENSE, alpha=0.35, linewidth=0.8, label="training")
    points = metrics["validation"]
    axis.plot(
        [p["step"] for p in points],
        [p["loss"] for p in points],
        color=DENSE,
        marker="o",
        markersize=3,
        label="validation",
    )
    axis.set(xlabel="step", ylabel="nats per token")
    axis.legend(frameon=False)
    rate = axis.twinx()
    rate.plot(steps, rates, color="#9aa4ad", linewidth=0.9, linestyle=":")
    rate.set_ylabel("learning rate", color="#7b858e")
    rate.set_ylim(0, max(rates) * 3)
    rate.spines[["top"]].set_visible(False)
    return figure


def _two_curves(metrics: dict[str, Any], full: dict[str, Any] | None):  # noqa: ANN202
    figure, axis = new_figure()
    for points, colour, label in (
        ((full or {}).get("validation", []), DENSE, "full precision"),
        (metrics["validation"], TERNARY, "ternary QAT"),
    ):
        axis.plot(
            [p["step"] for p in points],
            [p["loss"] for p in points],
            color=colour,
            marker="o",
            markersize=3,
            label=label,
        )
    axis.axvline(metrics["branch_step"], color="#9aa4ad", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step", ylabel="nats per token")
    axis.legend(frameon=False)
    return figure
