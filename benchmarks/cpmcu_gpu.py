"""cpmcu's GPU backend against transformers on a CUDA GPU: prompts, and tokens one after another.

Both load the same bfloat16 folder and take turns in one process. The peer is the faster of
transformers as it is and with a static cache under torch.compile's CUDA graphs; there is no peer
with 4-bit weights or sparse attention here, so those rows say what they gain over bfloat16 and
dense. Before rows are timed, logits after a prompt and after tokens more are compared.

    --model FOLDER    instead of SmolLM2 and a random model in MiniCPM4-0.5B's shape
    --lengths N ...   tokens before the decoded ones, and of the prompts

    --rehearse        without a GPU: a tiny model in Triton's interpreter; writes no result

No GPU was at hand when this was written: it has only been rehearsed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Case, main, measure

import testbed
from cpmcu import Engine, gpu_device, plan
from testbed import triton_without_gpu

LENGTHS = (128, 2048, 8192, 32768, 131072)
STEPS = 64
CLOSE = 0.05  # of the logits' range: two bfloat16 computations of one model differ by less


class Ours:
    """This repository's engine."""

    def __init__(self, model: Path, context: int, **options: Any) -> None:
        self.engine = Engine.from_pretrained(
            model, backend="gpu", max_context=context, **{"dtype": "bfloat16", **options}
        )

    def prefill(self, ids: list[int]) -> float:
        """Seconds until the logits after a new prompt are on the CPU."""
        self.engine.reset()
        start = time.perf_counter()
        self.logits = self.engine.prefill(ids)
        return time.perf_counter() - start

    def decode(self, ids: list[int], steps: int) -> float:
        """Seconds of `steps` likeliest tokens after a prompt; the graph was recorded before."""
        self.prefill(ids)
        token = int(self.logits.argmax())
        for _ in range(3):
            token = int(self.engine.decode(token).argmax())
        start = time.perf_counter()
        for _ in range(steps):
            token = int(self.engine.decode(token).argmax())
        return time.perf_counter() - start


class Transformers:
    """transformers on the same device; `static`: a cache of fixed size, compiled."""

    def __init__(self, model: Path, context: int, device: torch.device, *, static: bool) -> None:
        import transformers

        self.static, self.context, self.device = static, context, device
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16
        ).to(device)
        self.step = self.model.forward
        if static and device.type == "cuda":
            self.step = torch.compile(self.step, mode="reduce-overhead", fullgraph=True)
        self.past: Any = None

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> float:
        """As `Ours.prefill`."""
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        if not self.static:
            self.past = DynamicCache(config=config)
        elif self.past is None:  # one for all prompts: another's memory would be compiled again
            self.past = StaticCache(config=config, max_cache_len=self.context)
        else:
            self.past.reset()
        start = time.perf_counter()
        self.logits = self._forward(self.model.forward, ids)
        return time.perf_counter() - start

    def _forward(self, function: Callable[..., Any], ids: list[int]) -> torch.Tensor:
        rows = torch.tensor([ids], device=self.device)
        out = function(rows, past_key_values=self.past, logits_to_keep=1)
        return out.logits[0, -1].float().cpu()

    @torch.inference_mode()
    def decode(self, ids: list[int], steps: int) -> float:
        """As `Ours.decode`."""
        self.prefill(ids)
        token = int(self.logits.argmax())
        for _ in range(3):
            token = int(self._forward(self.step, [token]).argmax())
        start = time.perf_counter()
        for _ in range(steps):
            token = int(self._forward(self.step, [token]).argmax())
        return time.perf_counter() - start


class Bench:
    """Two peers and ours on one model; new prompts every time, so that no prefix is ever reused."""

    def __init__(self, name: str, model: Path, lengths: list[int], steps: int) -> None:
        self.name, self.model, self.steps = name, model, steps
        limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
        self.lengths = [n for n in lengths if n + steps + 4 <= limit]
        if not self.lengths:
            raise ValueError(f"{model}: no length of {lengths} fits its {limit} positions")
        self.context = max(self.lengths) + steps + 4
        device, reason = gpu_device.find()
        assert device is not None, reason
        self.peers = {
            "transformers": Transformers(model, self.context, device, static=False),
            "transformers, static cache, compiled": Transformers(
                model, self.context, device, static=True
            ),
        }
        self.vocab = self.peers["transformers"].model.config.vocab_size
        self.random = random.Random(0)
        on_gpu = device.type == "cuda"
        self.bandwidth = plan.measure_bandwidth(2048, device=device) if on_gpu else None

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return [self.random.randrange(3, self.vocab) for _ in range(length)]

    def gate(self, ours: Ours, options: dict[str, Any]) -> None:
        """AssertionError unless the next logits are the peer's, after a prompt and three tokens
        more: the first in plain launches, the second as a graph is recorded, the third as that.

        For what transformers does not have, rounded weights and sparse attention, the peer here is
        the engine's C++ backend: the same codes, the same blocks.
        """
        sparse = ours.engine.spec.sparse
        ids = self.prompt(max(min(self.lengths), sparse.least_keys if sparse else 0))
        tokens = self.prompt(3)
        ours.prefill(ids)
        mine = [ours.logits, *map(ours.engine.decode, tokens)]
        if options:
            plain = Engine.from_pretrained(self.model, backend="cpu", dtype="bfloat16",
                                           max_context=self.context, **options)  # fmt: skip
            theirs = [plain.prefill(ids), *map(plain.decode, tokens)]
        else:
            peer = self.peers["transformers"]
            peer.prefill(ids)
            with torch.inference_mode():
                more = [peer._forward(peer.model.forward, [token]) for token in tokens]
            theirs = [peer.logits, *more]
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a.isfinite().all(), f"token {i} after the prompt: logits are not finite"
            difference = float((a - b).abs().max() / (b.max() - b.min()))
            assert difference < CLOSE, f"token {i}: logits differ by {difference:.3f} of the range"

    def cases(self, options: dict[str, Any]) -> Iterator[Case]:
        """Prefill and decode at all lengths."""
        ours = Ours(self.model, self.context, **options)
        quant, sparse = options.get("quant", "bfloat16"), options.get("sparse", "off")
        what = f"{quant}{', sparse' if sparse != 'off' else ''}"
        sizes = ours.engine.spec.sparse
        lengths = [n for n in self.lengths if sizes is None or n >= sizes.least_keys]
        if not lengths:
            return
        self.gate(ours, options)
        for length in lengths:
            for do, work in (("prefill", length), ("decode", self.steps)):
                ask = (lambda e, n=length: e.prefill(self.prompt(n))) if do == "prefill" else (
                    lambda e, n=length: e.decode(self.prompt(n), self.steps)
                )  # fmt: skip
                name, peer = self.fastest(ask)
                bound = None
                if do == "decode" and self.bandwidth is not None:
                    bound = plan.make(
                        self.model, dtype="bfloat16", backend="gpu", context=length,
                        bandwidth=self.bandwidth, **options,
                    ).decode_bound  # fmt: skip
                yield Case(
                    f"{self.name}, {do} {'' if do == 'prefill' else 'at '}{length}, {what}",
                    "tokens/s", work, functools.partial(ask, ours), functools.partial(ask, peer),
                    name, lambda *_: None, bound=bound, repeats=5,
                )  # fmt: skip

    def fastest(self, ask: Callable[[Any], float]) -> tuple[str, Any]:
        """The quicker peer at this, of two tries each after one that compiles. One that fails, with
        whatever torch.compile raises, is named and left out from then on.
        """
        found = {}
        for name, peer in list(self.peers.items()):
            try:
                ask(peer)
                found[name] = min(ask(peer) for _ in range(2))
            except torch.OutOfMemoryError:
                continue
            except Exception as error:
                print(f"{name}: left out, {type(error).__name__}: {error}", flush=True)
                del self.peers[name]
        if not found:
            raise torch.OutOfMemoryError("no peer fits")
        name = min(found, key=lambda name: found[name])
        return name, self.peers[name]


def random_model(folder: Path) -> Path:
    """Random bfloat16 weights in MiniCPM4-0.5B's shape, as a Llama, which transformers has."""
    if not (folder / "config.json").exists():
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=2, head_dim=64, vocab_size=73448, max_position_embeddings=132_096,
            tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def all_cases(models: dict[str, Path], lengths: list[int], steps: int) -> Iterator[Case]:
    """bfloat16 first, then what only the engine has."""
    for name, model in models.items():
        bench = Bench(name, model, lengths, steps)
        for options in ({}, {"quant": "int8"}, {"quant": "int4"}, {"sparse": "on"}):
            try:
                yield from bench.cases(options)
            except torch.OutOfMemoryError:
                print(f"{name} {options}: left out, it does not fit into the GPU's memory")


def rehearse() -> None:
    """Every line but torch.compile's and CUDA's, with a tiny model in Triton's interpreter."""
    triton_without_gpu.start_interpreter()
    folder = Path("runs/bench-cpmcu-gpu/tiny")
    testbed.tiny("llama").bfloat16().save_pretrained(folder)
    bench = Bench("tiny", folder, [9], 2)
    for options in ({}, {"quant": "int4"}):
        for case in bench.cases(options):
            row = measure(case, seconds_of=lambda call: call())
            print(f"rehearsal: {row['name']}: ratio {row['ratio']:.3f} to {row['peer_name']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    if given.rehearse:
        sys.exit(rehearse())
    if not gpu_device.present():
        print("cpmcu_gpu: no CUDA device here, nothing was measured")
        sys.exit()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    models = {given.model.name: given.model} if given.model else {
        "SmolLM2": testbed.smollm2_path(),
        "0.5B": random_model(Path("runs/bench-cpmcu-gpu/minicpm4-0.5b")),
    }  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    own_time = functools.partial(measure, seconds_of=lambda call: call())
    main(f"cpmcu_gpu.{slug}", all_cases(models, given.lengths, given.steps), measure=own_time)
