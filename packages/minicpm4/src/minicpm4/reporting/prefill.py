"""The report's section on the stage `prefill`."""

from __future__ import annotations

from typing import Any

from minicpm4.reporting.blocks import Paragraph, Section, Table


def section(name: str, metrics: dict[str, Any], timings: dict[str, Any]) -> Section:
    """Every strategy: how well the answer is predicted, what it sends, how long it takes."""
    seconds = {row["strategy"]: row for row in timings["seconds"]}
    cases = metrics["cases"]
    fastest = min(cases, key=lambda case: seconds[case["strategy"]]["critical_path"])
    dense = seconds["dense"]["critical_path"]
    gain = dense / seconds[fastest["strategy"]]["critical_path"]
    return Section(
        name=name,
        title="Prefill: one prompt on many hosts",
        summary=(
            f"{metrics['model']} reads {metrics['tokens']:,} tokens of {metrics['task']} on "
            f"{metrics['hosts']} virtual hosts, {cases[0]['samples']} prompts."
        ),
        headline=(f"{gain:.1f}×", f"shorter critical path than one host: {fastest['strategy']}"),
        blocks=[
            Table(
                ["strategy", "answer's NLL", "KL to exact", "MB sent", "all work", "slowest host"],
                [
                    [
                        case["strategy"],
                        f"{case['nll']:.3f}",
                        f"{case['kl']:.4f}",
                        f"{case['bytes_sent'] / 1e6:.1f}",
                        f"{seconds[case['strategy']]['all_work']:.2f} s",
                        f"{seconds[case['strategy']]['critical_path']:.2f} s",
                    ]
                    for case in cases
                ],
                "NLL in nats per token of the right answer; exact strategies have a KL of 0.",
            ),
            Paragraph(
                "Hosts run one after another in one process; each has a clock of its own, which "
                "adds up its computing and the waiting for messages."
            ),
        ],
    )
