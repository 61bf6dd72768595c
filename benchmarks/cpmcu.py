"""cpmcu against llama.cpp, OpenVINO GenAI and transformers, each in its best format at equal bits.

Every engine is a process of its own (cpmcu_worker.py) that is asked in turn. Peers come from
Pythons named by environment variables; without one its rows are left out:

    LLAMA_CPP_PYTHON  has llama-cpp-python >= 0.3.36, built natively (on processors with AMX without
                      GGML_AMX: 0.3.36 crashes there on SmolLM2 in Q4_0)
    OPENVINO_PYTHON   has openvino-genai
    OPTIMUM_CLI       optimum-cli with optimum-intel[openvino]: makes OpenVINO's models, once

Rows compare what comes out before they are timed: on the same file, our next token is llama.cpp's,
or the two differ by less than what rounding moves logits by. `--only NAME ...` measures the groups
whose name holds one of the words, and keeps all other rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Case, main, measure

import testbed
from cpmcu import cpu_library, plan, weight_sizes
from cpmcu.convert import convert
from cpmcu.loader import Source
from cpmcu.quantise import quantise

WORKER = Path(__file__).parent / "cpmcu_worker.py"
BITS = {4: "Q4_0", 8: "Q8_0"}
DECODE_BARS = {1: 1.4, 2048: 1.9, 8000: 2.3}
LONG_BARS = {512: 1.25, 32768: 2.5, 131072: 6.0}
IDS = [1, 19556, 28, 905, 17, 1782, 314, 260, 3575, 282, 6042, 47, 5301]


class Worker:
    """An engine in another process. `options` go to its class in cpmcu_worker.py."""

    def __init__(self, name: str, python: str, kind: str, model: Path, threads: int, context: int,
                 **options: Any) -> None:  # fmt: skip
        self.name = name
        command = [python, str(WORKER), kind, str(model), str(threads), str(context)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [*command, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.load_seconds = self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """What the worker answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def seconds(self, do: str, **what: Any) -> Callable[[], float]:
        """A call that returns how long it took, as the worker measured it."""
        return lambda: self.ask(do, **what)["seconds"]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Bench:
    """Models on disk, workers on demand."""

    def __init__(self, work: Path, threads: int, sparse: str) -> None:
        self.work, self.threads, self.sparse = work, threads, sparse
        self.model = testbed.smollm2_path()
        self.llama = os.environ.get("LLAMA_CPP_PYTHON")
        self.openvino, self.optimum = (os.environ.get(f"{n}") for n in ("OPENVINO_PYTHON",
                                                                       "OPTIMUM_CLI"))  # fmt: skip
        self._open: list[Worker] = []
        work.mkdir(parents=True, exist_ok=True)

    def folder(self, bits: int) -> Path:
        """SmolLM2 in our layout, rounded to nearest: its speed is that of any method."""
        path = self.work / f"smollm2-int{bits}"
        quantise(self.model, path, method="rtn", bits=bits, group=32)
        return path

    def gguf(self, folder: Path) -> Path:
        """The same codes for llama.cpp."""
        path = folder.parent / f"{folder.name}.gguf"  # with_suffix would cut "0.5b"
        if not path.exists():
            convert(folder, path)
        return path

    def ov(self, bits: int) -> Path:
        """SmolLM2 for OpenVINO, made by optimum-intel."""
        path = self.work / f"smollm2-ov-int{bits}"
        if not (path / "openvino_model.bin").exists():
            kind = (
                ["int4", "--sym", "--group-size", "64", "--ratio", "1.0"] if bits == 4 else ["int8"]
            )
            subprocess.run(
                [str(self.optimum), "export", "openvino", "--model", str(self.model), "--task",
                 "text-generation-with-past", "--weight-format", *kind, str(path)],
                check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        return path

    def long_model(self) -> Path:
        """Random weights in MiniCPM4-0.5B's shape, 4 bits."""
        path, plain = self.work / "minicpm4-0.5b-int4", self.work / "minicpm4-0.5b"
        if not (path / "config.json").exists():
            if not (plain / "config.json").exists():
                random_minicpm4(plain)
            quantise(plain, path, method="rtn", bits=4, group=32)
        return path

    def ternary_model(self) -> Path:
        """The same made ternary, 256 columns to a scale, as llama.cpp's TQ2_0 has them."""
        from bitcpm import TernaryConfig
        from bitcpm.convert import pack_model
        from bitcpm.ptq import quantise_model

        path, rounded = self.work / "minicpm4-0.5b-ternary", self.work / "minicpm4-0.5b-rounded"
        if not (path / "config.json").exists():
            self.long_model()
            quantise_model(self.work / "minicpm4-0.5b", rounded, TernaryConfig(group_size=256))
            pack_model(rounded, path)
        return path

    def start(self, name: str, python: str, kind: str, model: Path, context: int,
              **options: Any) -> Worker:  # fmt: skip
        """A worker that `finish` will end."""
        worker = Worker(name, python, kind, model, options.pop("threads", self.threads), context,
                        **options)  # fmt: skip
        self._open.append(worker)
        return worker

    def ours(self, model: Path, context: int, **options: Any) -> Worker:
        """Our engine; `sparse` as the command line says."""
        return self.start("cpmcu", sys.executable, "cpmcu", model, context, **options)

    def llamas(self, model: Path, context: int) -> list[Worker]:
        """llama.cpp with and without its flash attention."""
        if self.llama is None:
            return []
        names = {True: "llama.cpp, flash attention", False: "llama.cpp"}
        kinds = {"int4": "Q4_0", "int8": "Q8_0", "ternary": "TQ2_0", "Q4_1": "Q4_1"}
        kind = next(made for part, made in kinds.items() if part in model.name)
        return [
            self.start(f"{name}, {kind}", self.llama, "llama", model, context, flash=flash)
            for flash, name in names.items()
        ]  # fmt: skip

    def openvinos(self, bits: int, context: int) -> list[Worker]:
        """OpenVINO with its two kinds of arithmetic."""
        if self.openvino is None or self.optimum is None:
            return []
        kinds = {
            "dynamic quantisation": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64},
            "bf16": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "bf16"},
        }
        return [
            self.start(f"OpenVINO, {name}", self.openvino, "openvino", self.ov(bits), context, **o)
            for name, o in kinds.items()
        ]

    def finish(self) -> None:
        """End all workers."""
        while self._open:
            self._open.pop().close()


def random_minicpm4(folder: Path) -> None:
    """A folder of random bfloat16 weights: 24 layers of 1024, 16/2 heads of 64, FFN 4096."""
    from safetensors.torch import save_file

    from cpmcu._fields import Fields
    from cpmcu.spec import from_config

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "minicpm4", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 64, "vocab_size": 73448, "max_position_embeddings": 132_096,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "scale_emb": 12, "scale_depth": 1.4,
        "dim_model_base": 256, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = from_config(Fields(config, "config.json")).tensors()
    tensors = {
        f"model.{n}": torch.ones(s, dtype=torch.bfloat16) if len(s) == 1
        else (0.02 * torch.randn(s, generator=generator)).bfloat16()
        for n, s in shapes.items()
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def same_next_token(ours: Worker, peer: Worker, ids: list[int]) -> None:
    """AssertionError unless the two, on the same file, agree on the next token."""
    a, b = (torch.tensor(w.ask("logits", ids=ids)["logits"]) for w in (ours, peer))
    first, second = int(a.argmax()), int(b.argmax())
    margin = float(b[second] - b[first])
    # Both round activations to 8 bits, each in its own way: as far apart as logits are moved by it.
    limit = 4 * float((a - b).std())
    assert first == second or margin < limit, f"next token {first}, {second}; margin {margin}"


def fastest(workers: list[Worker], do: str, **what: Any) -> Worker:
    """The worker that is quickest at this, of two tries each."""
    return min(workers, key=lambda w: min(w.seconds(do, **what)() for _ in range(2)))


def row(name: str, unit: str, work: float, ours: Worker, peers: list[Worker], do: str,
        gate: Callable[[], None], bar: float | None = None, repeats: int = 7,
        **what: Any) -> Case:  # fmt: skip
    """A case against the fastest of `peers`."""
    peer = fastest(peers, do, **what)
    return Case(
        name, unit, work, ours.seconds(do, **what), peer.seconds(do, **what), peer.name,
        lambda *_: gate(), bar=bar, repeats=repeats,
    )  # fmt: skip


def prefill_cases(bench: Bench, bits: int) -> Iterator[Case]:
    """2048 tokens, against llama.cpp and against OpenVINO."""
    folder = bench.folder(bits)
    ours = bench.ours(folder, 4096)
    for what, bar, peers in (
        ("llama.cpp", 2.5, bench.llamas(bench.gguf(folder), 4096)),
        ("OpenVINO", 0.9, bench.openvinos(bits, 4096)),
    ):
        if peers:
            gate = functools.partial(same_next_token, ours, peers[0], IDS)
            yield row(f"SmolLM2, prefill 2048, {bits} bits, against {what}", "tokens/s", 2048, ours,
                      peers, "prefill", gate if what == "llama.cpp" else lambda: None, bar,
                      tokens=2048)  # fmt: skip


def decode_cases(bench: Bench, bits: int) -> Iterator[Case]:
    """One token after another, after short and long prompts."""
    folder = bench.folder(bits)
    ours, llamas = bench.ours(folder, 8192), bench.llamas(bench.gguf(folder), 8192)
    peers = llamas + bench.openvinos(bits, 8192)
    if not peers:
        return
    gate = functools.partial(same_next_token, ours, llamas[0], IDS) if llamas else lambda: None
    for at in (1, 2048, 8000):
        yield row(f"SmolLM2, decode at {at}, {bits} bits", "tokens/s", 64, ours, peers, "decode",
                  gate, DECODE_BARS[at] if bits == 4 else None, at=at, steps=64)  # fmt: skip


def file_cases(bench: Bench) -> Iterator[Case]:
    """SmolLM2 as it was published for llama.cpp, in Q4_1: one file, whose codes both keep."""
    file = testbed.smollm2_gguf()
    ours, llamas = bench.ours(file, 4096), bench.llamas(file, 4096)
    if not llamas:
        return
    gate = functools.partial(same_next_token, ours, llamas[0], IDS)
    yield row("SmolLM2's own file, prefill 2048", "tokens/s", 2048, ours, llamas, "prefill", gate,
              tokens=2048)  # fmt: skip
    for at in (1, 2048):
        yield row(f"SmolLM2's own file, decode at {at}", "tokens/s", 64, ours, llamas, "decode",
                  gate, at=at, steps=64)  # fmt: skip


def int8_cache_cases(bench: Bench, bits: int) -> Iterator[Case]:
    """Keys and values in 8 bits, as OpenVINO has them by default."""
    folder = bench.folder(bits)
    ours, peers = bench.ours(folder, 8192, kv="int8"), bench.openvinos(bits, 8192)
    if bench.llama is not None:
        gguf = bench.gguf(folder)
        peers.append(bench.start(f"llama.cpp, {BITS[bits]}, cache in Q8_0", bench.llama, "llama",
                                 gguf, 8192, int8_cache=True))  # fmt: skip
    if peers:
        yield row(f"SmolLM2, decode at 8000, {bits} bits, cache in 8 bits", "tokens/s", 64, ours,
                  peers, "decode", lambda: None, DECODE_BARS[8000], repeats=5, at=8000,
                  steps=64)  # fmt: skip


def first_token_cases(bench: Bench, bits: int) -> Iterator[Case]:
    """32 tokens in, one out."""
    folder = bench.folder(bits)
    ours, llamas = bench.ours(folder, 4096), bench.llamas(bench.gguf(folder), 4096)
    if peers := llamas + bench.openvinos(bits, 4096):
        gate = functools.partial(same_next_token, ours, llamas[0], IDS) if llamas else lambda: None
        yield row(f"SmolLM2, first token after 32, {bits} bits", "1/s", 1, ours, peers, "prefill",
                  gate, 1.5, repeats=21, tokens=32)  # fmt: skip


def bf16_cases(bench: Bench) -> Iterator[Case]:
    """Unquantised weights, against transformers."""
    ours = bench.ours(bench.model, 4096, dtype="bfloat16")
    peer = bench.start("transformers, bfloat16", sys.executable, "transformers", bench.model, 4096)
    gate = functools.partial(same_next_token, ours, peer, IDS)
    yield row("SmolLM2, prefill 2048, bfloat16", "tokens/s", 2048, ours, [peer], "prefill", gate,
              tokens=2048)  # fmt: skip
    yield row("SmolLM2, decode at 2048, bfloat16", "tokens/s", 32, ours, [peer], "decode", gate,
              at=2048, steps=32)  # fmt: skip


# A virtual machine's memory that nobody used for a while is not there until the host finds some, at
# milliseconds for 2 MB: that is no engine's doing. So every load begins when memory was just used.
USED = """
import mmap
memory = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(memory), 4096):
    memory[at] = 1
"""


def process_cases(bench: Bench, bits: int) -> Iterator[dict[str, Any]]:
    """Loading until the first token, and peak memory after 2048 tokens: new processes in turn."""
    folder = bench.folder(bits)
    gguf = bench.gguf(folder)
    if bench.llama is None:
        return
    load: dict[str, list[float]] = {"ours": [], "peer": []}
    peak: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(5):
        for side in ("ours", "peer"):
            subprocess.run([sys.executable, "-c", USED], check=True)
            worker = (
                bench.ours(folder, 4096) if side == "ours"
                else bench.start("llama.cpp", bench.llama, "llama", gguf, 4096)
            )  # fmt: skip
            worker.ask("prefill", tokens=2048)
            worker.ask("decode", at=1, steps=16)
            load[side].append(worker.load_seconds)
            peak[side].append(worker.ask("peak")["bytes"])
            bench.finish()
    for name, unit, values, bar in (
        ("load from disk to first token", "1/s", load, 1.0),
        ("peak memory of the process, Python and libraries included", "1/GB", peak, 1 / 1.1),
    ):
        scale = 1 if unit == "1/s" else 1e9
        ours, peer = (statistics.median(values[side]) / scale for side in ("ours", "peer"))
        ratios = [p / o for o, p in zip(values["ours"], values["peer"], strict=True)]
        yield {
            "name": f"SmolLM2, {name}, {bits} bits", "unit": unit, "ours": 1 / ours,
            "peer": 1 / peer, "peer_name": f"llama.cpp, {BITS[bits]}", "ratio": peer / ours,
            "spread": [min(ratios), max(ratios)], "bound": None, "bar": bar,
            "pass": peer / ours >= bar,
        }  # fmt: skip


def limits_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decode against memory bandwidth, prefill against matrix products, two threads against one."""
    folder = bench.long_model()
    spec = Source(folder).spec
    bandwidth = plan.measure_bandwidth(seconds=3)
    read = (
        weight_sizes.of_spec(spec, "int4")[0]
        + 512 * 2 * spec.layers * spec.kv_heads * spec.head_dim * 2
    )
    workers = {t: bench.ours(folder, 2048, threads=t) for t in (bench.threads, 1)}
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(5):
        for threads, worker in workers.items():
            for do, what in (("decode", {"at": 512, "steps": 24}), ("prefill", {"tokens": 1024})):
                times.setdefault((threads, do), []).append(worker.ask(do, **what)["seconds"])
    median = {key: statistics.median(values) for key, values in times.items()}
    speed = read * 24 / median[bench.threads, "decode"]
    products = 2 * 1024 * (spec.parameters - spec.vocab * spec.hidden)
    peak = int8_peak()
    rate = products / median[bench.threads, "prefill"]
    entries = [
        ("decode at 512, bytes read of what torch.sum reads", "GB/s", speed / 1e9, bandwidth / 1e9,
         0.75),
        ("prefill 1024, of torch._int_mm's peak", "GOP/s", rate / 1e9, peak / 1e9, 0.55),
    ]  # fmt: skip
    entries += [
        (f"{do}, {bench.threads} threads against one", "1/s", 1 / median[bench.threads, do],
         1 / median[1, do], 1.7)
        for do in ("decode", "prefill")
    ]  # fmt: skip
    for name, unit, ours, peer, bar in entries:
        yield {
            "name": f"0.5B, {name}", "unit": unit, "ours": ours, "peer": peer,
            "peer_name": "the machine" if unit[0] == "G" else "one thread", "ratio": ours / peer,
            "spread": None, "bound": peer if unit[0] == "G" else None, "bar": bar,
            "pass": ours / peer >= bar,
        }  # fmt: skip


def int8_peak() -> float:
    """Operations a second of the best 8-bit matrix product that PyTorch has here."""
    import time

    best = 0.0
    for n in (1024, 2048, 4096):
        a = torch.randint(-9, 9, (n, n), dtype=torch.int8)
        b = torch.randint(-9, 9, (n, n), dtype=torch.int8).t()
        for _ in range(5):
            start = time.perf_counter()
            torch._int_mm(a, b)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def long_cases(bench: Bench, at: int) -> Iterator[Case]:
    """Decode far into a context, random MiniCPM4-0.5B."""
    folder = bench.long_model()
    context = at + 512
    ours = bench.ours(folder, context, sparse=bench.sparse)
    if llamas := bench.llamas(bench.gguf(folder), context):
        gate = functools.partial(same_next_token, ours, llamas[0], IDS)
        yield row(f"0.5B, decode at {at}, 4 bits", "tokens/s", 24, ours, llamas, "filled", gate,
                  LONG_BARS[at], repeats=5, at=at, steps=24)  # fmt: skip


def ternary_cases(bench: Bench) -> Iterator[Case]:
    """Ternary weights (1.6 bits; theirs in TQ2_0), embedding and head in 8 bits for both."""
    folder = bench.ternary_model()
    ours = bench.ours(folder, 2048)
    if llamas := bench.llamas(bench.gguf(folder), 2048):
        gate = functools.partial(same_next_token, ours, llamas[0], IDS)
        yield row("0.5B, decode at 128, ternary", "tokens/s", 48, ours, llamas, "decode", gate,
                  1.2, at=128, steps=48)  # fmt: skip
        yield row("0.5B, prefill 512, ternary", "tokens/s", 512, ours, llamas, "prefill", gate,
                  tokens=512)  # fmt: skip


def long_prefill(bench: Bench) -> Iterator[dict[str, Any]]:
    """A prompt of 32K tokens, once: it takes llama.cpp minutes."""
    folder, tokens = bench.long_model(), 32_768
    ours = bench.ours(folder, tokens + 64, sparse=bench.sparse)
    llamas = bench.llamas(bench.gguf(folder), tokens + 64)
    if not llamas:
        return
    same_next_token(ours, llamas[0], IDS)
    peer = fastest(llamas, "prefill", tokens=4096)
    seconds = [worker.seconds("prefill", tokens=tokens)() for worker in (ours, peer)]
    ratio = seconds[1] / seconds[0]
    yield {
        "name": "0.5B, prefill 32768, 4 bits", "unit": "tokens/s", "ours": tokens / seconds[0],
        "peer": tokens / seconds[1], "peer_name": peer.name, "ratio": ratio, "spread": None,
        "bound": None, "bar": 2.0, "pass": ratio >= 2.0,
    }  # fmt: skip


def groups(bench: Bench) -> dict[str, Callable[[], Iterator[Any]]]:
    """Everything that can be measured, by the words that `--only` looks for."""
    found: dict[str, Callable[[], Iterator[Any]]] = {}
    for bits in BITS:
        found |= {
            f"prefill {bits}": functools.partial(prefill_cases, bench, bits),
            f"decode {bits}": functools.partial(decode_cases, bench, bits),
            f"cache {bits}": functools.partial(int8_cache_cases, bench, bits),
            f"first {bits}": functools.partial(first_token_cases, bench, bits),
            f"process {bits}": functools.partial(process_cases, bench, bits),
        }
    found |= {"bf16": functools.partial(bf16_cases, bench),
              "file": functools.partial(file_cases, bench),
              "limits": functools.partial(limits_cases, bench),
              "ternary": functools.partial(ternary_cases, bench)}  # fmt: skip
    found |= {f"long {at}": functools.partial(long_cases, bench, at) for at in LONG_BARS}
    return found | {"longprefill": functools.partial(long_prefill, bench)}


def cases(bench: Bench, only: list[str]) -> Iterator[Any]:
    """All rows of the groups asked for."""
    for name, make in groups(bench).items():
        if only and not any(word in name for word in only):
            continue
        try:
            yield from make()
        except RuntimeError as error:
            print(f"{name}: left out, {error}", flush=True)
        finally:
            bench.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[],
                        help='groups: "prefill 4", "decode 8", "first", "process", "bf16", "file", '
                        '"limits", "long 32768", "longprefill"; other rows are kept')  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparse", default="on", help="of our engine in the long rows")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-cpmcu"))
    given = parser.parse_args()
    level = cpu_library.loaded().level
    bench = Bench(given.work, given.threads, given.sparse)
    print(f"kernels: {level}, {given.threads} threads")
    own_time = functools.partial(measure, seconds_of=lambda call: call())
    main("cpmcu", cases(bench, given.only), update=True, measure=own_time)
