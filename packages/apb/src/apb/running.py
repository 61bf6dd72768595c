"""What the commands `run` and `bench` do."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apb.costs import NETWORKS
from apb.engine import prefill
from apb.registry import COMPRESSORS, STRATEGIES, make_strategy
from apb.transport import Group
from apb.virtual import VirtualGroup

if TYPE_CHECKING:
    from rich.progress import Progress


def load(folder: Path) -> tuple[Any, Any]:
    """Model (eval mode) and tokenizer of a folder.

    Raises FileNotFoundError for a folder without a config.json, ImportError without transformers.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist: expected a model folder")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("apb needs transformers here: pip install 'minicpm4-apb[hf]'") from error
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@contextmanager
def launched(hosts: int) -> Iterator[Group]:
    """The processes of torchrun where it started us, else virtual hosts."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield VirtualGroup(hosts)
        return
    from apb.distributed import torchrun_group

    with torchrun_group() as group:
        yield group


def run_file(
    model: Path,
    samples: Path,
    output: Path,
    *,
    hosts: int,
    compressor: str | None,
    query_in_anchor: bool,
    strategy: str,
    anchor_length: int | None,
    passing_length: int | None,
    **generation: Any,
) -> None:
    """Answer every line of `samples` that `output` does not hold yet."""
    if not samples.exists():
        raise FileNotFoundError(f"{samples} does not exist")
    lines = _read(samples)
    done = _count(output)
    network, tokenizer = load(model)
    chosen: Any = compressor
    if compressor is not None and compressor not in COMPRESSORS:
        from apb.locret_heads import LocretHeads

        chosen = LocretHeads(compressor)
    options = {"anchor_length": anchor_length, "passing_length": passing_length}
    with launched(hosts) as group, _bars() as bars:
        device = _device()
        network = network.to(device)
        first = 0 in group.ranks
        answered = bars.add_task("answers", total=len(lines), completed=done, visible=first)
        layers = bars.add_task(strategy, total=1.0, visible=first)
        for sample in lines[done:]:
            document = _ids(tokenizer, sample["document"], device)
            query = _ids(tokenizer, sample["query"], device, begin=False)
            began = time.perf_counter()
            context = prefill(
                network, document, strategy=strategy, hosts=group, compressor=chosen,
                query=query if query_in_anchor and strategy in ("star", "apb", "spava") else None,
                progress=lambda share: bars.update(layers, completed=share), **options,
            )  # fmt: skip
            prefilled = time.perf_counter() - began
            stop = tokenizer.eos_token_id
            answer = context.generate(query, stop_ids=() if stop is None else (stop,), **generation)
            if first:
                result = {
                    **{key: value for key, value in sample.items() if key != "document"},
                    "answer": tokenizer.decode(answer[0], skip_special_tokens=True),
                    "strategy": strategy,
                    "hosts": group.size,
                    "tokens": document.shape[1],
                    "prefill_seconds": prefilled,
                    "bytes_sent": sum(context.report.bytes_sent.values()),
                }
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
            bars.advance(answered)


def time_strategies(
    model: Path,
    tokens: int,
    hosts: int,
    network: str,
    repeats: int,
    names: list[str] | None,
) -> list[dict[str, Any]]:
    """Median seconds, critical path and bytes of each strategy, run in turn."""
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    if tokens < 1 or repeats < 1:
        raise ValueError(f"tokens and repeats must be at least 1, got {tokens} and {repeats}")
    loaded = load(model)[0].to(_device())
    link = NETWORKS[network]
    group = VirtualGroup(hosts, latency=link.latency, bandwidth=link.bandwidth)
    vocabulary = loaded.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(0, vocabulary, (1, tokens), generator=generator).to(_device())
    names = names or list(STRATEGIES)
    made = {name: make_strategy(name) for name in names}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    sent = {}
    with _bars() as bars:
        timed = bars.add_task("timing", total=(repeats + 1) * len(names))
        for turn in range(repeats + 1):  # the first warms up
            for name, strategy in made.items():
                bars.update(timed, description=name)
                began = time.perf_counter()
                context = prefill(loaded, document, strategy=strategy, hosts=group)
                if turn:
                    seen[name].append((time.perf_counter() - began, max(group.clocks)))
                sent[name] = sum(context.report.bytes_sent.values())
                bars.advance(timed)
    return [
        {
            "strategy": name,
            "seconds": statistics.median(s for s, _ in seen[name]),
            "critical_path": statistics.median(c for _, c in seen[name]),
            "bytes_sent": sent[name],
        }
        for name in names
    ]


def _device() -> str:
    """A GPU where there is one; under torchrun this process's own, which is the current one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _bars() -> Progress:
    """Progress on standard error, gone in the end."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def _ids(tokenizer: Any, text: str, device: str, *, begin: bool = True) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=begin).input_ids.to(device)


def _read(file: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        texts = [sample.get(key) for key in ("document", "query")] if type(sample) is dict else [0]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                f'{file}, line {number}: expected {{"document": text, "query": text}}, both not '
                "empty"
            )
        found.append(sample)
    return found


def _count(output: Path) -> int:
    """Finished lines; half a line that a kill left behind is cut off."""
    if not output.exists():
        return 0
    whole = output.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end != len(whole):
        with output.open("r+b") as file:
            file.truncate(end)
    return whole.count(b"\n")
