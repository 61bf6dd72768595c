"""locret against the model with its full cache, and its training against the official loop's.

SmolLM2-135M-Instruct in float32, b = 1024 and B = 512. `--only WORD` runs the rows whose name has
the word; the others stay in the results' file. The heads are trained once, in runs/locret-bench;
a killed training goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, environment

import testbed
from locret import LocretCache, LocretConfig, RetainingHeads, locret, prefill
from locret.data import examples, varied
from locret.evaluate import overlaps
from locret.labels import collect
from locret.training import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import locret_official  # noqa: E402

RUNS = Path("runs/locret-bench")
CONFIG = LocretConfig(budget=1024, chunk=512, stabilisers=256, sinks=4, local=100)
LONG = 7500
CORPORA = ("wikipedia", "essays", "reference", "news")
TRAINING = TrainConfig()
WINDOWS = 256  # texts of 1,024 tokens; the last eighth from documents that no head learns from


def random_ids(tokens: int) -> torch.Tensor:
    """int64 `[1, tokens]`; time does not depend on which."""
    return torch.randint(5, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))


def line(name: str, unit: str, ours: float, peer: float, peer_name: str, ratio: float,
         bar: float | None, **more: Any) -> dict[str, Any]:  # fmt: skip
    """A row; ratio > 1: ours is better."""
    return {
        "name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name,
        "ratio": ratio, "bound": None, "bar": bar,
        "pass": None if bar is None else ratio >= bar, **more,
    }  # fmt: skip


def held() -> list[dict]:
    """Entries that any head ever holds, counted in the buffers, prompt and continuation."""
    model, _ = testbed.smollm2()
    cache = LocretCache(CONFIG)
    with torch.no_grad(), locret(model, "keynorm", CONFIG):
        model(input_ids=random_ids(4000), past_key_values=cache, logits_to_keep=1)
        for _ in range(600):
            model(input_ids=random_ids(1), past_key_values=cache)
    most = max(layer.entries.planes["key"][0].shape[2] for layer in cache.layers)
    assert most >= cache.peak
    return [line("most entries of a head, 4,000 tokens and 600 new", "entries", most,
                 CONFIG.capacity, "b + B", CONFIG.capacity / most, 1.0)]  # fmt: skip


_MEMORY = """
import sys, torch, testbed
from pathlib import Path
from locret import LocretConfig, RetainingHeads, prefill
model, _ = testbed.smollm2()
kind, tokens = sys.argv[1], int(sys.argv[2])
ids = torch.randint(5, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
config = LocretConfig(budget=1024, chunk=512, stabilisers=256, sinks=4, local=100)
heads = RetainingHeads.for_model(model, hidden=256)
def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith(name)) / 1024
with torch.no_grad():
    model(input_ids=ids[:, :64])  # what a first call allocates for good
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if kind == "ours":
        prefill(model, heads, ids, config)
    else:
        model(input_ids=ids, logits_to_keep=1)
print(megabytes("VmHWM") - before)
"""


def memory() -> list[dict]:
    """Peak growth of resident memory in a prefill, a fresh process each, in turn."""
    found: dict[str, list[float]] = {"ours": [], "dense": []}
    for _ in range(3):
        for kind, values in found.items():
            done = subprocess.run(
                [sys.executable, "-c", _MEMORY, kind, str(LONG)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            values.append(float(done.stdout.split()[-1]))
    ours, dense = (statistics.median(values) for values in found.values())
    return [line(f"peak memory growth of a {LONG:,}-token prefill (bar: 40 % of dense)", "MB", ours,
                 dense, "transformers, full cache", dense / ours, 1 / 0.4)]  # fmt: skip


def speed() -> list[dict]:
    """Prefill with heads of the default width, in turn with dense."""
    model, _ = testbed.smollm2()
    heads, ids = RetainingHeads.for_model(model, hidden=256), random_ids(LONG)
    seconds: dict[str, list[float]] = {"ours": [], "dense": []}
    with torch.no_grad():
        room = LocretConfig(budget=1000, chunk=300, stabilisers=0)
        with locret(model, heads, room):  # the gate: with room for all it is the model
            mine = model(input_ids=ids[:, :1000], logits_to_keep=1).logits
        gap = (mine - model(input_ids=ids[:, :1000], logits_to_keep=1).logits).abs().max()
        assert gap < 1e-2, gap
        for _ in range(5):
            for name, call in (
                ("ours", lambda: prefill(model, heads, ids, CONFIG)),
                ("dense", lambda: model(input_ids=ids, logits_to_keep=1)),
            ):
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    ratios = [d / o for o, d in zip(seconds["ours"], seconds["dense"], strict=True)]
    ours, dense = (statistics.median(values) for values in seconds.values())
    return [line(f"prefill of {LONG:,} tokens (bar: 0.8 of dense's time)", "tokens/s", LONG / ours,
                 LONG / dense, "transformers, SDPA, full cache", statistics.median(ratios),
                 1 / 0.8, spread=[min(ratios), max(ratios)])]  # fmt: skip


def decode() -> list[dict]:
    """Time of a token after 1K … 64K streamed ones, the caches measured in turn."""
    model, _ = testbed.smollm2()
    heads, caches = RetainingHeads.for_model(model, hidden=256), {}
    with torch.no_grad(), locret(model, heads, CONFIG):
        cache = LocretCache(CONFIG)
        for tokens in (1024, 4096, 16384, 65536):
            new = random_ids(tokens - cache.columns)
            model(input_ids=new, past_key_values=cache, logits_to_keep=1)
            caches[tokens] = cache.fork()
            print(f"{tokens:,} tokens streamed, {caches[tokens].peak} held", file=sys.stderr)
        seconds: dict[int, list[float]] = {tokens: [] for tokens in caches}
        lengths = list(caches)
        for turn in range(12):  # each length is first as often as last
            for tokens in lengths[turn % 4 :] + lengths[: turn % 4]:
                copy = caches[tokens].fork()
                model(input_ids=random_ids(1), past_key_values=copy)
                began = time.perf_counter()
                for _ in range(16):
                    model(input_ids=random_ids(1), past_key_values=copy)
                seconds[tokens].append((time.perf_counter() - began) / 16)
    ms = {tokens: 1e3 * statistics.median(values) for tokens, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds[1024], seconds[65536], strict=True)]
    return [line("a decoded token after 64K streamed (bar: within 10 % of after 1K)", "ms",
                 ms[65536], ms[1024], "after 1K", statistics.median(ratios), 0.9,
                 by_length=ms)]  # fmt: skip


def windows(tokenizer: Any, count: int) -> list:
    """Windows of real text, the last eighth from documents of another split."""
    unseen, found = max(1, count // 8), []
    for split, wanted in (("train", count - unseen), ("test", unseen)):
        documents = [
            [d.text for d in testbed.corpus(c, split) if len(d.text) > 5120][: 2 * wanted]
            for c in CORPORA
        ]
        mixed = [t for turn in range(2 * wanted) for c in documents for t in c[turn : turn + 1]]
        found += examples(mixed[: 2 * wanted], tokenizer, count=wanted)
    return found


def training() -> list[dict]:
    """Heads from nothing: seconds, and overlap with the best tenth on unseen documents."""
    model, tokenizer = testbed.smollm2(testbed.quick_dtype())
    prose, clock = windows(tokenizer, WINDOWS), RUNS / "seconds.json"
    texts = varied(prose, 0.5, 0.5, tokenizer)  # as `locret train` does
    spent = json.loads(clock.read_text()) if clock.exists() else 0.0
    began = time.perf_counter()

    def progress(text: str, done: float) -> None:
        RUNS.mkdir(parents=True, exist_ok=True)
        clock.write_text(json.dumps(spent + time.perf_counter() - began))

    heads, facts = train(model, texts, TRAINING, RUNS / "work", progress)
    seconds = spent + time.perf_counter() - began
    shutil.rmtree(RUNS)
    rows = [line(f"training on {facts['tokens']:,} tokens (bar: 600 s)", "s", seconds, 600.0,
                 "the bar", 600 / seconds, 1.0)]  # fmt: skip
    for kind, bar in (("ridge", 0.5), ("mlp", 0.56)):
        value = facts["overlap"][kind]
        rows.append(line(f"overlap with the best tenth, unseen documents, {kind}", "share", value,
                         0.1, "chance", value / 0.1, bar / 0.1))  # fmt: skip
    for kind in ("attention", "scores"):
        value = overlaps(model, {"": heads}, prose[facts["texts"] :], labels=kind)[""]
        rows.append(line(f"overlap with the best tenth by {kind}, unseen prose alone, mlp", "share",
                         value, 0.1, "chance", value / 0.1, None))  # fmt: skip
    return rows


def official() -> list[dict]:
    """Labels, and labels with training, per text: ours against the release's way of working."""
    model, tokenizer = testbed.smollm2()
    few = windows(tokenizer, 8)
    theirs = locret_official.Loop(model, hidden=TRAINING.hidden)
    ids, answer = few[0].ids[None], few[0].answer
    mine: list[torch.Tensor] = []
    collect(model, ids, answer, lambda layer, x, y: mine.append(y))
    worst = max((a - b).abs().max() for a, b in zip(mine, theirs.labels(ids, answer), strict=True))
    assert worst < 1e-2, f"the labels differ by {worst}"
    quick, _ = testbed.smollm2(testbed.quick_dtype())
    pairs: list[tuple[float, float]] = []
    for text in few[:5]:
        began = time.perf_counter()
        collect(quick, text.ids[None], text.answer, lambda layer, x, y: None)
        ours = time.perf_counter() - began
        began = time.perf_counter()
        theirs.labels(text.ids[None], text.answer)
        pairs.append((ours, time.perf_counter() - began))
    rows = [_throughput("labels", pairs, 5.0)]
    # One text in a training of as many epochs as ours: labels once, then that many steps.
    pairs = []
    for at in range(3):
        work = RUNS / "official"
        shutil.rmtree(work, ignore_errors=True)
        began = time.perf_counter()
        train(quick, few, replace(TRAINING, labels="scores"), work)
        ours = (time.perf_counter() - began) / len(few)
        shutil.rmtree(work)
        text = few[at]
        began = time.perf_counter()
        labels = theirs.labels(text.ids[None], text.answer)
        label = time.perf_counter() - began
        began = time.perf_counter()
        theirs.step(text.ids[None], labels)
        pairs.append((ours, label + TRAINING.epochs * (time.perf_counter() - began)))
    rows.append(_throughput(f"labels and {TRAINING.epochs} epochs of training", pairs, 5.0))
    return rows


def _throughput(name: str, pairs: list[tuple[float, float]], bar: float) -> dict[str, Any]:
    ratios = [theirs / ours for ours, theirs in pairs]
    ours, theirs = (1 / statistics.median(p[i] for p in pairs) for i in (0, 1))
    return line(f"{name}, texts of 1,024 tokens", "texts/s", ours, theirs,
                "port of the official loop", statistics.median(ratios), bar,
                spread=[min(ratios), max(ratios)])  # fmt: skip


def plan() -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Words that `--only` looks for, and what makes their rows."""
    yield "held counted entries", held
    yield "memory peak prefill", memory
    yield "speed prefill time", speed
    yield "decode flat", decode
    yield "training time overlap", training
    yield "official loop labels throughput", official


def main() -> None:
    """Run the rows, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name has this word")
    options = parser.parse_args()
    file = RESULTS / "locret.json"
    old = json.loads(file.read_text(encoding="utf-8")) if options.only and file.exists() else {}
    result: dict[str, Any] = {"tool": "locret", "env": environment(), "rows": []}
    print(f"{'case':<72} {'ours':>10} {'peer':>10} {'ratio':>7}  unit, peer")
    for name, make in plan():
        if not re.search(options.only, name, re.I):
            continue
        for row in make():
            result["rows"].append(row)
            missed = "" if row["pass"] in (None, True) else f", BAR {row['bar']:.2f} MISSED"
            print(f"{row['name']:<72} {row['ours']:>10,.2f} {row['peer']:>10,.2f} "
                  f"{row['ratio']:>6.2f}×  {row['unit']}, {row['peer_name']}{missed}",
                  flush=True)  # fmt: skip
        new = {r["name"] for r in result["rows"]}
        kept = [r for r in old.get("rows", []) if r["name"] not in new]
        merged = {**result, "rows": result["rows"] + [{"env": old["env"], **r} for r in kept]}
        file.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
