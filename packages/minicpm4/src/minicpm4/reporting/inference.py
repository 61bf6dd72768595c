"""The report's sections on the stages `sparse` and `generate`."""

from __future__ import annotations

from typing import Any

from minicpm4.reporting.blocks import (
    DENSE,
    SPARSE,
    Figure,
    Samples,
    Section,
    Table,
    new_figure,
    svg,
)


def sparse(
    name: str, metrics: dict[str, Any], timings: dict[str, Any], visited: dict[str, Any]
) -> Section:
    """Accuracy, seconds in attention and blocks visited, dense beside sparse."""
    cases, seconds = metrics["cases"], timings["attention_seconds"]
    total = {mode: sum(row[mode] for row in seconds) for mode in ("dense", "sparse")}
    right = {mode: sum(c[mode]["accuracy"] * c[mode]["samples"] for c in cases) for mode in total}
    prompts = sum(c["dense"]["samples"] for c in cases)
    shape = ", ".join(f"{key} {value}" for key, value in metrics["config"].items())
    return Section(
        name=name,
        title="Sparse: needles in a long context",
        summary=(
            f"{metrics['model']}, which never saw sparse attention in training, answers {prompts} "
            f"prompts with dense attention and with InfLLM v2 ({shape}). Right answers: "
            f"{right['dense']:g} dense, {right['sparse']:g} sparse."
        ),
        headline=(
            f"{total['dense'] / total['sparse']:.2f}×",
            f"attention speed-up; {right['sparse']:g} of {prompts} found, dense {right['dense']:g}",
        ),
        blocks=[
            Figure(svg(_seconds(seconds)), "Seconds in attention: selection, attention, decoding."),
            Table(
                ["task", "tokens", "dense right", "sparse right", "blocks visited", "dense s",
                 "sparse s", "speed-up"],
                [
                    [
                        case["task"],
                        case["tokens"],
                        f"{case['dense']['accuracy']:.0%}",
                        f"{case['sparse']['accuracy']:.0%}",
                        f"{case['sparse']['visited_share']:.0%}",
                        row["dense"],
                        row["sparse"],
                        row["dense"] / row["sparse"],
                    ]
                    for case, row in zip(cases, seconds, strict=True)
                ],
                "Below 1 the sparse way was slower. The dense side is PyTorch's fused attention.",
            ),
            Figure(
                svg(_blocks(visited)),
                f"Layer {visited['layer']}, a prompt of {visited['tokens']} tokens: how many of a "
                "block's queries visit each earlier block. The band is the window, the first "
                "column the initial block; the marks on top show where the needle lies.",
            ),
            Samples(
                [
                    (
                        f"{case['task']}, {case['tokens']} tokens, {mode} · expected "
                        f"{', '.join(case['answers'][0])}",
                        case[mode]["texts"][0],
                    )
                    for case in cases
                    for mode in ("dense", "sparse")
                ],
                "What was answered to the first prompt of each kind.",
            ),
        ],
    )  # fmt: skip


def generate(name: str, metrics: dict[str, Any], timings: dict[str, Any]) -> Section:
    """Speed and memory of each model, and what it wrote."""
    first = next(iter(timings))
    return Section(
        name=name,
        title="Generate: text, speed, memory",
        summary=(
            "Greedy text from each model, and the medians of timed runs: a prompt, then one token "
            "at a time. Weights are in memory as the engine multiplies them."
        ),
        headline=(
            f"{timings[first]['decode_tokens_per_second']:.0f}",
            f"tokens per second, {first}",
        ),
        blocks=[
            Table(
                [
                    "model",
                    "prompt",
                    "prefill, tokens/s",
                    "decode, tokens/s",
                    "peak memory, MB",
                    "weights",
                ],
                [
                    [
                        kind,
                        row["prefill_tokens"],
                        row["prefill_tokens_per_second"],
                        row["decode_tokens_per_second"],
                        round(row["peak_memory_bytes"] / 1e6),
                        row["weights"],
                    ]
                    for kind, row in timings.items()
                ],
                "Memory is the whole process with Python and PyTorch in it, some 400 MB. Sparse "
                "attention visits 24 blocks of 64 keys for a token, dense attention all keys.",
            ),
            Samples(
                [
                    (f"{kind} · {sample['prompt']}", sample["text"])
                    for kind, model in metrics["models"].items()
                    for sample in model["samples"]
                ]
            ),
        ],
    )


def _seconds(rows: list[dict[str, Any]]):  # noqa: ANN202 - matplotlib is imported only to draw
    figure, axis = new_figure(height=0.5 + 0.45 * len(rows))
    labels = [f"{row['task']}, {row['tokens']}" for row in rows]
    places = range(len(rows))
    for mode, colour, shift in (("dense", DENSE, -0.2), ("sparse", SPARSE, 0.2)):
        axis.barh(
            [p + shift for p in places], [row[mode] for row in rows], 0.38, color=colour, label=mode
        )
    axis.set_yticks(list(places), labels)
    axis.invert_yaxis()
    axis.set_xlabel("seconds in attention")
    axis.legend(frameon=False)
    return figure


def _blocks(visited: dict[str, Any]):  # noqa: ANN202
    import numpy as np

    shares = np.array([[np.nan if x is None else x for x in row] for row in visited["map"]])
    figure, axis = new_figure(width=4.8, height=4.2)
    axis.grid(False)
    picture = axis.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, interpolation="nearest")
    for depth in visited["depths"]:
        axis.plot(depth * (shares.shape[1] - 1), -1.5, marker="v", color=SPARSE, clip_on=False)
    axis.set(xlabel="block of keys", ylabel="block of queries")
    figure.colorbar(picture, ax=axis, label="share of queries that visit", shrink=0.8)
    return figure
