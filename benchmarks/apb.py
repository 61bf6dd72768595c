"""apb against dense attention, torch's own ring attention, Star and gloo's all_gather.

SmolLM2-135M's real weights, one process, hosts one after another (`VirtualGroup`). Rows named
"all work" are wall-clock of all hosts' work; rows named "critical path" are the slowest host's own
clock, computing and waiting for others, with a network that costs nothing (its bytes are counted
and priced by `apb explain`). torch's `_templated_ring_attention` runs inside the same model on the
same clocks: its code, with only its two network calls given to the virtual hosts. "core" is one
layer's attention on the last host, against one SDPA call on as many pairs. The gloo row runs four
real processes.

    python benchmarks/apb.py --only 8K    # 8K, "critical", "core", "gloo", or nothing for all
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apb_gpu  # first: harness takes this folder from the search path
import harness
import torch
from torch import Tensor

import apb
import testbed
from apb.costs import MODELS
from apb.partial import partial_attention
from apb.plan import Layer
from apb.registry import make_strategy

HOSTS = 8
WORKER = Path(__file__).parent / "apb_worker.py"


def document(model: Any, tokens: int) -> Tensor:
    """Real prose as token ids [1, tokens]."""
    _, tokenizer = model
    text = "\n\n".join(d.text for d in testbed.corpus("wikipedia"))
    ids = tokenizer(text[: tokens * 8], return_tensors="pt").input_ids
    assert ids.shape[1] >= tokens, "not enough text"
    return ids[:, :tokens]


class TorchRing:
    """torch's `_templated_ring_attention` as a strategy, with its network on virtual hosts."""

    exact = True

    def __init__(self, balanced: bool) -> None:
        self.inner = make_strategy("zigzag" if balanced else "ring")
        self.name, self.balanced = f"torch ring, balanced={balanced}", balanced

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def attend(self, layer: Layer) -> Tensor:
        """One layer by torch's code."""
        from torch.distributed.tensor.experimental._context_parallel import _attention as ours

        _here.host = layer.host
        return ours._templated_ring_attention(
            None, 2, _op(layer.scaling), layer.q, layer.k, layer.v, is_causal=True
        )[0]


_here = threading.local()


def _op(scaling: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same kernels as ours, grouped heads and all: the peer must not lose by its op."""

    def op(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, **_: Any) -> tuple[Tensor, Tensor]:
        return partial_attention(q, k, v, causal=is_causal, scaling=scaling)

    return op


class _Rotater:
    def __init__(self, *_: Any) -> None:
        self.host = _here.host

    def exchange_buffers(self, buffer: Tensor) -> None:
        rank, size = self.host.rank, self.host.size
        self.pending = self.host.exchange(
            {(rank + 1) % size: buffer}, {(rank - 1) % size: tuple(buffer.shape)}, buffer
        )

    def next_buffer(self) -> Tensor:
        return next(iter(self.pending.wait().values()))


@contextmanager
def torch_on_virtual_hosts(balanced: bool) -> Iterator[None]:
    """torch's ring with its rank, size and hop from the virtual host of the running thread."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ours

    network = SimpleNamespace(
        # What torch's code asks of torch.distributed, answered by the virtual host.
        ProcessGroup=type(None),
        get_rank=lambda _: _here.host.rank,
        get_world_size=lambda _: _here.host.size,
    )
    options = SimpleNamespace(convert_to_f32=True, enable_load_balance=balanced)
    given = {"dist": network, "_create_rotater": _Rotater, "_cp_options": options}
    own = {name: getattr(ours, name) for name in given}
    try:
        for name, value in given.items():
            setattr(ours, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(ours, name, value)


def critical_path(model: Any, ids: Tensor, strategy: Any) -> tuple[float, Tensor]:
    """Seconds on the slowest host's clock, and logits of one more token."""
    group = apb.VirtualGroup(HOSTS)
    if isinstance(strategy, TorchRing):
        with torch_on_virtual_hosts(strategy.balanced):
            context = apb.prefill(model[0], ids, strategy=strategy, hosts=group)
    else:
        context = apb.prefill(model[0], ids, strategy=strategy, hosts=group)
    seconds = max(group.clocks)
    return seconds, context.logits(ids[:, -1:])


def interleaved(
    name: str, work: float, unit: str, sides: dict[str, Callable[[], float]], bar: float | None,
    peer_name: str, bound: float | None, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """A row of the harness's format from two callables that return seconds."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for side, call in sides.items():
            seconds[side].append(call())
    ratios = [p / o for o, p in zip(seconds["ours"], seconds["peer"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "name": name, "unit": unit, "ours": work / statistics.median(seconds["ours"]),
        "peer": work / statistics.median(seconds["peer"]), "peer_name": peer_name, "ratio": ratio,
        "spread": [min(ratios), max(ratios)], "bound": bound, "bar": bar,
        "pass": None if bar is None else ratio >= bar,
    }  # fmt: skip


def whole_prefill(model: Any, tokens: int, bar: float, bound: float, repeats: int) -> dict:
    """All eight hosts' work, in turn, against one dense forward by PyTorch's SDPA."""
    ids = document(model, tokens)
    strategy = make_strategy("apb", "key-norm")
    dense = model[0]
    # Gate: passing everything without an anchor is the dense model, on a part of the document.
    part = ids[:, :1024]
    everything = make_strategy("apb", "key-norm", anchor_length=0, passing_length=1024)
    got = apb.prefill(dense, part[:, :-1], strategy=everything, hosts=HOSTS).logits(part[:, -1:])
    with torch.no_grad():
        expected = dense(part, logits_to_keep=1, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)

    def ours() -> float:
        return harness.wall_seconds(lambda: apb.prefill(dense, ids, strategy=strategy, hosts=HOSTS))

    def peer() -> float:
        with torch.no_grad():
            return harness.wall_seconds(lambda: dense.base_model(input_ids=ids, use_cache=True))

    if tokens <= 8192:
        ours(), peer()
    return interleaved(
        f"all work, {tokens // 1024}K tokens, {HOSTS} virtual hosts, apb", tokens, "tokens/s",
        {"ours": ours, "peer": peer}, bar, "transformers' SDPA, dense", bound, repeats,
    )  # fmt: skip


def paths(model: Any, tokens: int, repeats: int, bars: bool) -> Iterator[dict]:
    """The slowest host's clock: apb against torch's rings, our own and Star."""
    ids = document(model, tokens)
    ours = make_strategy("apb", "key-norm")
    peers = [
        (TorchRing(False), "torch _templated_ring_attention", 2.5, 3.18),
        (TorchRing(True), "torch _templated_ring_attention, head-tail", 1.5, 1.83),
        (make_strategy("zigzag"), "our own zigzag ring", None, None),
        (make_strategy("star"), "our own Star", 1.2, 1.35),
    ]
    # Gate on a short document: torch's ring inside the model is the dense model.
    short = ids[:, :512]
    expected = critical_path(model, short, make_strategy("dense"))[1]
    for peer, *_ in peers[:3]:
        got = critical_path(model, short, peer)[1]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
    for peer, name, bar, bound in peers:
        yield interleaved(
            f"critical path, {tokens // 1024}K tokens, {HOSTS} hosts, apb", tokens, "tokens/s",
            {
                "ours": lambda: critical_path(model, ids, ours)[0],
                "peer": lambda p=peer: critical_path(model, ids, p)[0],
            },
            bar if bars else None, name, bound if bars else None, repeats,
        ) | {"name": f"critical path {tokens // 1024}K, {HOSTS} hosts, vs {name[:40]}"}  # fmt: skip


def exchange() -> dict:
    """Prefix exchange against all_gather, 16 MiB a rank, four gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
            str(WORKER), folder,
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=500)
        found = json.loads((Path(folder) / "result.json").read_text("utf-8"))
    ratios = [p / o for o, p in zip(found["ours"], found["peer"], strict=True)]
    ratio, mebibytes = statistics.median(ratios), 16
    assert found["bytes"] == [(3 - rank) * mebibytes * 2**20 for rank in range(4)]
    return {
        "name": "gloo: prefix exchange, 16 MiB a rank, 4 processes", "unit": "exchanges/s",
        "ours": 1 / statistics.median(found["ours"]), "peer": 1 / statistics.median(found["peer"]),
        "peer_name": "all_gather_into_tensor", "ratio": ratio,
        "spread": [min(ratios), max(ratios)], "bound": None, "bar": 2.0, "pass": ratio >= 2.0,
        "bytes": sum(found["bytes"]), "bytes_of_all_gather": 4 * 3 * mebibytes * 2**20,
    }  # fmt: skip


def rows(only: list[str], repeats: int) -> Iterator[dict | harness.Case]:
    """The rows whose group's name holds one of `only`."""
    model: Any = None

    def smollm2() -> Any:
        nonlocal model
        model = model or testbed.smollm2()
        return model

    def cores() -> Iterator[harness.Case]:
        for tokens in (8192, 32768):
            yield apb_gpu.core(MODELS["smollm2-135m"], tokens, HOSTS, "cpu", torch.float32)

    groups: dict[str, Callable[[], Any]] = {
        "gloo": lambda: [exchange()],
        "core": cores,
        "all work 8K": lambda: [whole_prefill(smollm2(), 8192, 1.3, 1.45, repeats)],
        "critical 8K": lambda: paths(smollm2(), 8192, repeats, False),
        "all work 32K": lambda: [whole_prefill(smollm2(), 32768, 1.9, 2.26, min(repeats, 3))],
        "critical 32K": lambda: paths(smollm2(), 32768, min(repeats, 3), True),
    }
    for name, make in groups.items():
        if not only or any(word in name for word in only):
            began = time.monotonic()
            yield from make()
            print(f"  ({name}: {time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="groups whose name holds a word")
    parser.add_argument("--repeats", type=int, default=5, help="pairs; at most 3 at 32K")
    arguments = parser.parse_args()
    harness.main("apb", rows(arguments.only, arguments.repeats), update=bool(arguments.only))
