"""Perplexity of WikiText-2 with every kind of weights, ours and llama.cpp's on the same tokens.

Windows of equal length, each after BOS, spread evenly over the test set; every token but the first
counts. "First token too": its keys and values come from rounded weights, as all others'; in other
rows they are stored exactly (`--sinks`). Calibration text is WikiText-2's validation set.
Differences to float32 are paired: the same tokens, so a few windows say much; ± is their standard
error over windows.

    python experiments/quality.py --data FOLDER [--llama PYTHON]

FOLDER holds validation.parquet and test.parquet (column "text"); PYTHON is one that can import
llama_cpp. Rows that are there already are not measured again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import testbed
from cpmcu import Engine, tokenizer
from cpmcu._cli import run
from cpmcu._files import write_json, write_text
from cpmcu.convert import convert
from cpmcu.loader import Source
from cpmcu.quantise import quantise

HERE = Path(__file__).parent
RESULTS = HERE / "results/quality.json"
QUANTISED = {
    "rtn-search": {"method": "rtn", "search": True},
    "gptq": {"method": "gptq"},
    "p-gptq": {"method": "p-gptq"},
    "p-gptq-drop": {"method": "p-gptq", "prefix": "drop"},
    "rtn-search-plain": {"method": "rtn", "search": True, "sinks": False},
    "gptq-plain": {"method": "gptq", "sinks": False},
    "p-gptq-plain": {"method": "p-gptq", "sinks": False},
    "p-gptq-drop-plain": {"method": "p-gptq", "prefix": "drop", "sinks": False},
    "p-gptq-act": {"method": "p-gptq", "act_order": True},
    "p-gptq-64": {"method": "p-gptq", "group": 64},
    "int8-rtn": {"method": "rtn", "bits": 8, "search": False, "sinks": False},
    "int8-rtn-search": {"method": "rtn", "bits": 8, "search": True},
    "int8-rtn-search-plain": {"method": "rtn", "bits": 8, "search": True, "sinks": False},
    "int8-p-gptq": {"method": "p-gptq", "bits": 8},
    "int8-p-gptq-plain": {"method": "p-gptq", "bits": 8, "sinks": False},
}
# name: (label, how). "engine" takes options of the engine, "made" a folder of QUANTISED, "exact"
# the same without rounded activations, "file" the published GGUF, "llama" a type of llama.cpp's own
# quantiser, "ours" a folder of QUANTISED as a GGUF file in llama.cpp.
ROWS: dict[str, tuple[str, str, Any]] = {
    "float32": ("float32", "engine", {"dtype": "float32"}),
    "bfloat16": ("bfloat16", "engine", {"dtype": "bfloat16"}),
    "int8": ("int8, rounded to nearest, first token too", "engine", {"quant": "int8"}),
    "int8-exact": ("the same, activations exact", "exact", "int8-rtn"),
    "int8-search-plain": ("int8, searched scales, first token too", "made",
                          "int8-rtn-search-plain"),
    "int8-search": ("int8, searched scales", "made", "int8-rtn-search"),
    "int8-search-exact": ("the same, activations exact", "exact", "int8-rtn-search"),
    "int8-p-gptq-plain": ("int8, P-GPTQ, first token too", "made", "int8-p-gptq-plain"),
    "int8-p-gptq": ("int8, P-GPTQ", "made", "int8-p-gptq"),
    "file": ("its own file, Q4_1, codes kept", "file", None),
    "int4": ("int4, rounded to nearest, first token too", "engine", {"quant": "int4"}),
    "int4-search-plain": ("int4, rounded, searched scales, first token too", "made",
                          "rtn-search-plain"),
    "int4-search": ("int4, rounded, searched scales", "made", "rtn-search"),
    "gptq-plain": ("int4, GPTQ, first token too", "made", "gptq-plain"),
    "gptq": ("int4, GPTQ", "made", "gptq"),
    "p-gptq-plain": ("int4, P-GPTQ, first positions levelled, first token too", "made",
                     "p-gptq-plain"),
    "p-gptq": ("int4, P-GPTQ, first positions levelled", "made", "p-gptq"),
    "p-gptq-drop-plain": ("int4, P-GPTQ, first positions dropped, first token too", "made",
                          "p-gptq-drop-plain"),
    "p-gptq-drop": ("int4, P-GPTQ, first positions dropped", "made", "p-gptq-drop"),
    "p-gptq-act": ("int4, P-GPTQ, act-order", "made", "p-gptq-act"),
    "p-gptq-64": ("int4, P-GPTQ, groups of 64", "made", "p-gptq-64"),
    "p-gptq-exact": ("P-GPTQ, activations exact", "exact", "p-gptq"),
    "llama-bf16": ("llama.cpp, BF16", "llama", "BF16"),
    "llama-q8": ("llama.cpp, Q8_0", "llama", "Q8_0"),
    "llama-file": ("llama.cpp, its own file, Q4_1", "llama-file", None),
    "llama-q4": ("llama.cpp, Q4_0", "llama", "Q4_0"),
    "llama-p-gptq-plain": ("llama.cpp, our P-GPTQ, levelled, first token too, as Q4_0", "ours",
                           "p-gptq-plain"),
    "llama-p-gptq": ("llama.cpp, our P-GPTQ, levelled, as Q4_0", "ours", "p-gptq"),
    "llama-drop-plain": ("llama.cpp, our P-GPTQ, dropped, first token too, as Q4_0", "ours",
                         "p-gptq-drop-plain"),
}  # fmt: skip
# Rows that are also compared with each other.
PAIRS = (("p-gptq", "gptq"), ("p-gptq-plain", "gptq-plain"), ("gptq", "gptq-plain"))
# Reads windows of ids, prints the sum of -log p of each but for its first token.
PEER = """
import json, sys
import llama_cpp, numpy as np
path, windows = sys.argv[1], json.load(open(sys.argv[2]))
model = llama_cpp.Llama(path, n_ctx=len(windows[0]), n_batch=len(windows[0]), logits_all=True,
                        verbose=False, n_threads=int(sys.argv[3]), n_threads_batch=int(sys.argv[3]))
for ids in windows:
    model.reset()
    model.eval(ids)
    x = np.asarray(model.scores[: len(ids) - 1], np.float64)
    top = x.max(1)
    lse = top + np.log(np.exp(x - top[:, None]).sum(1))
    print(float((lse - x[np.arange(len(ids) - 1), ids[1:]]).sum()), flush=True)
"""
# llama.cpp's own quantiser; embedding and head in Q8_0, as ours have them.
QUANTISE = """
import ctypes, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = {"Q4_0": 2, "Q8_0": 7}[sys.argv[3]]
params.token_embedding_type = params.output_tensor_type = 8
params.nthread = 1
raise SystemExit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(),
                                                ctypes.byref(params)))
"""
app = typer.Typer(add_completion=False)


def text_of(path: Path) -> str:
    """The column "text" of a parquet file."""
    import pyarrow.parquet as pq

    return "\n".join(pq.read_table(path)["text"].to_pylist())


def windows_of(model: Path, text: str, count: int, length: int) -> list[list[int]]:
    """Windows of `length` ids, BOS included, spread evenly over the text."""
    source = Source(model)
    words = tokenizer.load(source)
    assert words is not None
    ids = words.encode(text, special=False)
    bos = [] if source.spec.bos is None else [source.spec.bos]
    body = length - len(bos)
    most = len(ids) // body
    return [
        bos + ids[s : s + body] for i in range(count) for s in [i * most // count * body]
    ]  # fmt: skip


def losses(engine: Engine, windows: Sequence[Sequence[int]]) -> list[float]:
    """Sum of -log p over each window, its first token left out."""
    found = []
    for ids in windows:
        logits = engine.logits(ids)[:-1].double()
        picked = logits.gather(1, torch.tensor(ids[1:])[:, None])
        found.append(float((logits.logsumexp(1) - picked[:, 0]).sum()))
    return found


def peer_losses(python: str, gguf: Path, windows: list[list[int]], work: Path) -> list[float]:
    """The same from llama.cpp."""
    (work / "windows.json").write_text(json.dumps(windows))
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    command = [python, "-c", PEER, str(gguf), str(work / "windows.json"), threads]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{python} failed on {gguf}: {done.stderr[-500:]}")
    return [float(line) for line in done.stdout.split()]


class Lab:
    """What rows are made of: models in `work`, made once."""

    def __init__(self, model: Path, work: Path, calib: Path, llama: str | None, size: int) -> None:
        self.model, self.work, self.calib, self.llama, self.size = model, work, calib, llama, size

    def made(self, name: str) -> Path:
        """The folder of an entry of QUANTISED."""
        folder = self.work / name
        options = QUANTISED[name]
        calibrated = options["method"] != "rtn"
        print(f"  quantising {name}", flush=True)
        quantise(
            self.model, folder, calib=self.calib if calibrated else None, samples=self.size,
            length=512, **options,
        )  # fmt: skip
        return folder

    def gguf(self, name: str, make: Callable[[Path], Any]) -> Path:
        """A GGUF file, made once."""
        path = self.work / f"{name}.gguf"
        if not path.is_file():
            make(path)
        return path

    def measure(self, how: str, what: Any, windows: list[list[int]]) -> list[float]:
        """Losses of one row."""
        limit = {"max_context": len(windows[0])}
        if how == "engine":
            return losses(Engine.from_pretrained(self.model, **limit, **what), windows)
        if how == "made":
            return losses(Engine.from_pretrained(self.made(what), **limit), windows)
        if how == "exact":
            exact = {"dtype": "float32", "quant": "float32", **limit}
            return losses(Engine.from_pretrained(self.made(what), **exact), windows)
        if how == "file":
            return losses(Engine.from_pretrained(testbed.smollm2_gguf(), **limit), windows)
        assert self.llama is not None
        if how == "llama-file":
            return peer_losses(self.llama, testbed.smollm2_gguf(), windows, self.work)
        if how == "ours":
            folder = self.made(what)
            path = self.work / f"{what}.gguf"
            path.unlink(missing_ok=True)  # the folder may be another than last time
            convert(folder, path)
        else:
            path = plain = self.gguf("BF16", lambda p: convert(self.model, p, "BF16"))
            if what != "BF16":
                command = [self.llama, "-c", QUANTISE, str(plain)]
                path = self.gguf(
                    f"llama-{what}",
                    lambda p: subprocess.run([*command, str(p), what], check=True,
                                             capture_output=True),
                )  # fmt: skip
        return peer_losses(self.llama, path, windows, self.work)


def paired(results: dict[str, Any], ours: str, theirs: str) -> str:
    """Perplexity of one row against another's, and the standard error over windows."""
    rows, per = results["rows"], results["length"] - 1
    parts = [(a - b) / per for a, b in zip(rows[ours], rows[theirs], strict=True)]
    mean = sum(parts) / len(parts)
    spread = sum((p - mean) ** 2 for p in parts) / max(1, len(parts) - 1) / len(parts)
    return f"{math.expm1(mean):+.2%} ± {100 * spread**0.5:.2f}"


def table(results: dict[str, Any]) -> str:
    """The table of RESULTS.md."""
    tokens = results["windows"] * (results["length"] - 1)
    lines = ["| weights | perplexity | against float32 |", "|---|---|---|"]
    for name, (label, _, _) in ROWS.items():
        if name not in results["rows"]:
            continue
        sums = results["rows"][name]
        value = math.exp(sum(sums) / tokens)
        versus = ""
        if "float32" in results["rows"] and name != "float32":
            versus = paired(results, name, "float32")
        lines.append(f"| {label} | {value:.3f} | {versus} |")
    lines.append("")
    for ours, theirs in PAIRS:
        if {ours, theirs} <= results["rows"].keys():
            found = paired(results, ours, theirs)
            lines.append(f"- {ROWS[ours][0]}, against {ROWS[theirs][0]}: {found}")
    return "\n".join(lines)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of validation.parquet and test.parquet.")],
    llama: Annotated[
        str | None, typer.Option(help="A python with llama-cpp-python.", envvar="LLAMA_CPP_PYTHON")
    ] = None,
    work: Annotated[Path, typer.Option(help="Models that are made.")] = Path("runs/quality"),
    windows: Annotated[int, typer.Option(help="How many.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help="These rows alone.")] = None,
) -> None:
    """Measure, and write results/quality.json and the table of RESULTS.md."""
    if not (data / "test.parquet").is_file():
        raise FileNotFoundError(f"{data}: no test.parquet; WikiText-2 (raw) as parquet goes there")
    model = testbed.smollm2_path()
    work.mkdir(parents=True, exist_ok=True)
    calib = work / "calib.txt"
    if not calib.is_file():
        write_text(calib, text_of(data / "validation.parquet"))
    lab = Lab(model, work, calib, llama, samples)
    results = {"windows": windows, "length": length, "samples": samples, "rows": {}}
    if RESULTS.is_file():
        old = json.loads(RESULTS.read_text(encoding="utf-8"))
        if {k: old[k] for k in ("windows", "length", "samples")} == {
            k: results[k] for k in ("windows", "length", "samples")
        }:
            results = old
    ids = windows_of(model, text_of(data / "test.parquet"), windows, length)
    for name, (label, how, what) in ROWS.items():
        if name in results["rows"] or (only and name not in only):
            continue
        if how in ("llama", "llama-file", "ours") and llama is None:
            continue
        results["rows"][name] = lab.measure(how, what, ids)
        write_json(RESULTS, results)
        mean = sum(results["rows"][name]) / (windows * (length - 1))
        print(f"{label}: {math.exp(mean):.3f}", flush=True)
    place(table(results))


def place(text: str) -> None:
    """Put the table between its marks in RESULTS.md."""
    path = HERE / "RESULTS.md"
    before, _, rest = path.read_text(encoding="utf-8").partition("<!-- quality -->\n")
    _, _, after = rest.partition("<!-- end -->")
    write_text(path, f"{before}<!-- quality -->\n{text}\n<!-- end -->{after}")
    print(text)


if __name__ == "__main__":
    run(app)
