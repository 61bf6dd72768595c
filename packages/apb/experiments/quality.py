"""What APB's parts are worth on a real model: answer NLL and KL to exact attention, by ablation.

Follows the ablation of arXiv 2502.12085, Table 3 (query in the anchor, compressor, passing,
anchor), on SmolLM2-135M and RULER-style needles. Every (task, tokens, hosts, sample, arm) is one
line of the results file: a killed run goes on, and `--minutes` ends one in time.

    python packages/apb/experiments/quality.py run --samples 64 --minutes 8
    python packages/apb/experiments/quality.py fill --heads runs/locret/heads-repeats
    python packages/apb/experiments/quality.py table

`fill` adds the arms that finished samples lack. Heads, the paper's own compressor, come from
locret's experiment (`quality.py --group original`); without them their arms are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
# Options of apb.prefill; "query": whether the query is in the anchor. Exact attention that reads
# the query before the document too tells what the query in front is worth by itself.
ARMS: dict[str, dict[str, Any]] = {
    "full": {"strategy": "dense"},
    "full, query first": {"strategy": "dense", "query_first": True},
    "star": {"strategy": "star"},
    "apb": {"strategy": "apb", "compressor": "query-attention", "query": True},
    "apb, key norm": {"strategy": "apb", "compressor": "key-norm", "query": True},
    "apb, key difference": {"strategy": "apb", "compressor": "key-difference", "query": True},
    "apb, random": {"strategy": "apb", "compressor": "random", "query": True},
    "apb, no query": {"strategy": "apb", "compressor": "key-norm"},
    "anchor only": {"strategy": "apb", "compressor": "none", "query": True},
    "no anchor": {"strategy": "apb", "compressor": "key-norm", "anchor_length": 0},
    "nothing": {"strategy": "apb", "compressor": "none", "anchor_length": 0},
}
HEADS = "apb, heads"
# With trained heads, the paper's compressor; without the query or the anchor they choose the same.
HEADS_ARMS: dict[str, dict[str, Any]] = {
    HEADS: {"query": True},
    f"{HEADS}, no query": {},
    f"{HEADS}, no anchor": {"anchor_length": 0},
}
# What the paper, or sense, puts first.
ORDER = (
    ("full, query first", "full"), ("full, query first", HEADS), ("full, query first", "apb"),
    ("full", HEADS), ("full", "apb"),
    (HEADS, "apb"), (HEADS, "apb, random"), (HEADS, "anchor only"), (HEADS, "star"),
    (HEADS, f"{HEADS}, no query"), (HEADS, f"{HEADS}, no anchor"),
    ("apb", "apb, random"), ("apb", "anchor only"), ("apb", "star"),
    ("apb, key difference", "apb, random"),
    ("apb, random", "anchor only"), ("anchor only", "no anchor"),
    ("anchor only", f"{HEADS}, no anchor"),
)  # fmt: skip


def chosen_arms(heads: Path | None, names: list[str] | None) -> dict[str, dict[str, Any]]:
    """`ARMS`, and those of trained heads where there are some; of them `names` and full."""
    arms = ARMS
    if heads is not None:
        import apb

        compressor = apb.LocretHeads(heads)
        arms = ARMS | {
            arm: {"strategy": "apb", "compressor": compressor, **options}
            for arm, options in HEADS_ARMS.items()
        }
    if names is None:
        return arms
    if unknown := set(names) - arms.keys():
        raise SystemExit(f"--arms: no {', '.join(sorted(unknown))}; there are {', '.join(arms)}")
    return {arm: options for arm, options in arms.items() if arm == "full" or arm in names}


def score(
    model: Any, tokenizer: Any, sample: Any, hosts: int,
    arms: dict[str, dict[str, Any]] = ARMS,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Every arm's NLL of the answer and KL from full, nats per token, and its slowest host."""
    import torch

    import apb
    import testbed

    text = testbed.ruler_prompt(sample, tokenizer)
    cut = text.rindex(sample.prompt.rsplit("\n", 1)[1])
    document, query, answer = (
        tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids
        for part in (text[:cut], text[cut:], " " + sample.answers[0])
    )
    tail = torch.cat([query, answer], 1)
    found, full = {}, None
    for arm, options in arms.items():
        options = dict(options)
        in_anchor = query if options.pop("query", False) else None
        read = torch.cat([query, document], 1) if options.pop("query_first", False) else document
        dense = options["strategy"] == "dense"
        context = apb.prefill(model, read, query=in_anchor, hosts=1 if dense else hosts, **options)
        rows = context.logits(tail)[:, -answer.shape[1] - 1 : -1].float().log_softmax(-1)
        full = rows if full is None else full
        found[arm] = {
            "nll": -rows.gather(-1, answer.unsqueeze(-1)).mean().item(),
            "kl": (full.exp() * (full - rows)).sum(-1).mean().item(),
            "rows": max(context.report.rows.values()),
            "pairs": max(context.report.pairs.values()),
        }
    return found


def run(arguments: argparse.Namespace) -> None:
    """Fill the results file, oldest gap first, until done or out of time."""
    import torch
    from rich.progress import Progress

    import testbed

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else testbed.quick_dtype()
    model, tokenizer = testbed.smollm2(dtype)  # for all arms alike
    torch.set_num_threads(arguments.threads)
    arms = chosen_arms(arguments.heads, arguments.arms)
    done = {(r["task"], r["tokens"], r["hosts"], r["sample"]) for r in read()}
    cells = list(
        itertools.product(
            range(arguments.first, arguments.samples),
            arguments.tokens,
            arguments.hosts,
            arguments.tasks,
        )
    )
    todo = [c for c in cells if (c[3], c[1], c[2], c[0]) not in done]
    end = time.monotonic() + 60 * arguments.minutes
    RESULTS.parent.mkdir(exist_ok=True)
    with Progress() as progress:
        bar = progress.add_task("samples", total=len(cells), completed=len(cells) - len(todo))
        for number, tokens, hosts, task in todo:
            if time.monotonic() > end:
                break
            [sample] = testbed.ruler(task, tokens, 1, number, tokenizer)
            row = {"task": task, "tokens": tokens, "hosts": hosts, "sample": number}
            row["dtype"] = str(dtype).removeprefix("torch.")
            row["arms"] = score(model, tokenizer, sample, hosts, arms)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            progress.advance(bar)


def fill(arguments: argparse.Namespace) -> None:
    """Add the arms that finished samples lack, against exact attention computed again."""
    import torch
    from rich.progress import track

    import testbed

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else testbed.quick_dtype()
    model, tokenizer = testbed.smollm2(dtype)
    torch.set_num_threads(arguments.threads)
    arms, rows = chosen_arms(arguments.heads, arguments.arms), read()
    name = str(dtype).removeprefix("torch.")
    end = time.monotonic() + 60 * arguments.minutes
    chosen = [
        row
        for row in rows
        if row["task"] in arguments.tasks
        and row["tokens"] in arguments.tokens
        and row["hosts"] in arguments.hosts
        and arguments.first <= row["sample"] < arguments.samples
        and row.get("dtype", "bfloat16") == name  # all arms of a sample are in one dtype
        and not arms.keys() <= row["arms"].keys()
    ]
    for row in track(chosen, "samples"):
        if time.monotonic() > end:
            break
        [sample] = testbed.ruler(row["task"], row["tokens"], 1, row["sample"], tokenizer)
        missing = {arm: o for arm, o in arms.items() if arm == "full" or arm not in row["arms"]}
        found = score(model, tokenizer, sample, row["hosts"], missing)
        row["arms"] |= {arm: value for arm, value in found.items() if arm != "full"}
        scratch = RESULTS.with_suffix(".partial")
        scratch.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
        os.replace(scratch, RESULTS)


def read() -> list[dict[str, Any]]:
    """Whole lines of the results file."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines() if line]


def bootstrap(differences: list[float], draws: int = 10_000) -> float:
    """One-sided p that the mean difference is not above 0, resampling pairs."""
    generator = random.Random(0)
    n = len(differences)
    below = sum(sum(generator.choices(differences, k=n)) <= 0 for _ in range(draws))
    return (below + 1) / (draws + 1)


def table() -> None:
    """Means of every cell, and paired tests of the order that the paper reports.

    Samples in bfloat16 and in float32 stand together: all arms of a sample are in one dtype. An
    arm that some samples lack has no mean, and is compared on those that have it.
    """
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for r in read():
        found.setdefault((r["task"], r["tokens"], r["hosts"]), []).append(r)
    for (task, tokens, hosts), rows in sorted(found.items()):
        mine = [r["arms"] for r in rows]
        # Rows that do not say are older, in bfloat16.
        dtypes = Counter(r.get("dtype", "bfloat16") for r in rows)
        said = ", ".join(f"{count} {name}" for name, count in dtypes.items())
        print(f"\n#### {task}, {tokens} tokens, {hosts} hosts, {len(mine)} samples ({said})\n")
        print("| arm | NLL | KL to full | slowest host's rows |\n|---|---|---|---|")
        for arm in (*ARMS, *HEADS_ARMS):
            if all(arm in m for m in mine):
                mean = {k: sum(m[arm][k] for m in mine) / len(mine) for k in ("nll", "kl", "rows")}
                print(f"| {arm} | {mean['nll']:.3f} | {mean['kl']:.4f} | {mean['rows']:.0f} |")
        for better, worse in ORDER:
            both = [m for m in mine if better in m and worse in m]
            if not both:
                continue
            where = f" ({len(both)} samples)" if len(both) < len(mine) else ""
            print(f"- {better} < {worse}{where}:", "; ".join(
                f"{kind} {sum(gaps) / len(gaps):+.4f}, p = {bootstrap(gaps):.4f}"
                for kind in (("nll",) if better.startswith("full") else ("nll", "kl"))
                for gaps in [[m[worse][kind] - m[better][kind] for m in both]]
            ))  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "fill", "table"])
    parser.add_argument("--heads", type=Path, help="folder of locret's heads for SmolLM2")
    parser.add_argument("--arms", nargs="+", help="and full; default: all that there are")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_2", "niah_multikey_1"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--hosts", nargs="+", type=int, default=[4])
    parser.add_argument("--samples", type=int, default=64, help="of each task and length")
    parser.add_argument("--first", type=int, default=0, help="the first sample of this run")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"],
                        help="of the model; default: what this processor is fast in")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.command == "table":
        table()
    else:
        {"run": run, "fill": fill}[arguments.command](arguments)


if __name__ == "__main__":
    main()
