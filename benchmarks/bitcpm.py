"""bitcpm's packed products on CPUs against ggml's ternary types and PyTorch.

ggml is the library that llama-cpp-python builds (`ggml_peer.py` says how to get it); it
multiplies through its public interface, its own quantisation of the activations included, as ours
includes `prepare`. Weights "from memory" are several matrices of 256 MiB or more together; "in
cache" is one of 8 MB. Every result is compared with a float64 product of the same ternary weights
before anything is timed. "training" is a step of quantisation-aware training against the same step
without it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator

import ggml_peer
import numpy as np
import torch
from harness import Case, main
from torch import Tensor

import testbed
from bitcpm import PackedTensor, TernaryConfig, TernaryMatrix, ternarize
from bitcpm.matrix import large_bytes, required_kernels
from bitcpm.packing import pack_codes

MEMORY = 256 << 20
CACHE = 8 << 20
BITS = {("1.6bit", -1): 1.6, ("1.6bit", 128): 1.75, ("2bit", 128): 2.125}
O, I = 16384, 4096  # from memory
# Bars of the plan: against TQ2_0 and TQ1_0, by (codec, group size), 2 threads, from memory.
BARS = {("1.6bit", -1): (1.2, 2.2), ("1.6bit", 128): (1.1, 2.0), ("2bit", 128): (None, None)}
CACHE_BARS = {1: 2.5, 2: 1.8}


def label(codec: str, g: int) -> str:
    """For example "1.6bit g=128"."""
    return f"{codec} g={'row' if g == -1 else g}"


def random_weights(rows: int, columns: int, g: int, codec: str) -> PackedTensor:
    """Random codes; scales of 1, which ggml's containers hold too."""
    codes = np.random.default_rng(0).integers(-1, 2, (rows, columns)).astype(np.int8)
    groups = 1 if g == -1 else -(-columns // g)
    scales = torch.ones(rows, groups, dtype=torch.bfloat16)
    return PackedTensor(pack_codes(torch.from_numpy(codes), codec), scales, codes.shape, g, codec)


class Ours:
    """Products of one token (or more) with several copies of a matrix."""

    def __init__(self, packed: PackedTensor, x: Tensor, copies: int) -> None:
        first = TernaryMatrix.from_packed(packed)
        self.matrices = [first, *(first.copy() for _ in range(copies - 1))]
        self.x = x
        self.bytes = copies * first.nbytes

    def __call__(self) -> Tensor:
        """All products; the last one's result."""
        for matrix in self.matrices:
            out = matrix.multiply(self.x)
        return out


def gate(packed: PackedTensor, x: Tensor, theirs: ggml_peer.Products | None) -> Callable:
    """Refuses a result, ours or ggml's, that is off by more than int8 activations explain."""
    truth = x.double() @ packed.dequantise(torch.float64).T
    # Each activation is off by at most half of max / 127: a random walk over the non-zero weights,
    # whose standard deviation is a ninth of what is allowed.
    step = x.abs().amax(1, keepdim=True).double() / 127
    allowed = 0.5 * step * (2 / 3 * packed.shape[1]) ** 0.5 * 5

    def check(ours: Tensor, _: object) -> None:
        results = [ours.double()]
        if theirs is not None:
            results.append(torch.from_numpy(theirs.result().copy()).double())
        for result in results:
            error = (result - truth).abs()
            assert bool((error <= allowed).all()), f"a product is off by {error.max()}"

    return check


def read_bandwidth(threads: int) -> float:
    """Bytes a second that PyTorch's sum reads from 512 MiB of large pages."""
    data = large_bytes(512 << 20).zero_().view(torch.float32)
    torch.set_num_threads(threads)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def vector_cases(ggml: dict | None, threads: int, quick: bool) -> Iterator[Case]:
    """One token, weights from memory and in cache."""
    torch.set_num_threads(threads)
    x = torch.randn(1, I)
    bandwidth = read_bandwidth(threads)
    for (codec, g), bits in BITS.items():
        for where, size in (("memory", MEMORY), ("cache", CACHE)):
            if quick and where == "memory":
                continue
            rows = O if where == "memory" else int(size * 8 / bits / I) // 256 * 256
            copies = -(-int(size * 8 / 1.6) // (rows * I)) if where == "memory" else 1
            packed = random_weights(rows, I, g, codec)
            ours = Ours(packed, x, copies)
            weights = packed.dequantise(torch.float32).numpy()
            work = rows * I * copies / 1e9
            limit = bandwidth * 8 / (8 * ours.bytes / (rows * I * copies)) / 1e9
            name = f"GEMV from {where}, {label(codec, g)}, {threads} threads"
            repeats = 9 if where == "memory" else 101
            for number, kind in enumerate(("TQ2_0", "TQ1_0") if ggml else ()):
                theirs = ggml_peer.Products(ggml, kind, weights, x.numpy(), copies, threads)
                bar = BARS[codec, g][number] if (where, threads) == ("memory", 2) else None
                if where == "cache" and kind == "TQ2_0" and g == 128:
                    bar = CACHE_BARS[threads]
                yield Case(
                    name, "Gweights/s", work, ours, theirs, f"ggml {kind}",
                    gate(packed, x, theirs), bound=limit if where == "memory" else None, bar=bar,
                    repeats=repeats,
                )  # fmt: skip
                del theirs
            if where == "memory":
                data = large_bytes(ours.bytes // 4 * 4).zero_().view(torch.float32)
                yield Case(
                    f"{name}, of the read bandwidth", "GB/s", ours.bytes / 1e9, ours,
                    functools.partial(data.sum), "torch.sum of as many bytes",
                    gate(packed, x, None), bar=0.85 if threads == 2 else None, repeats=repeats,
                )  # fmt: skip
                del data
                dense = [packed.dequantise().contiguous() for _ in range(2)]
                token = x.bfloat16()

                def bf16(dense=dense, token=token, count=copies) -> None:
                    for i in range(count):
                        torch.nn.functional.linear(token, dense[i % 2])

                yield Case(
                    name, "Gweights/s", work, ours, bf16, "torch bf16 linear",
                    gate(packed, x, None), repeats=5,
                )  # fmt: skip
                del dense
            del ours


def matrix_cases(threads: int, size: int, T: int = 512) -> Iterator[Case]:
    """A prompt of T tokens, one square matrix."""
    torch.set_num_threads(threads)
    x = torch.randn(T, size)
    half = x.bfloat16()
    quantised = torch.randint(-127, 128, (T, size), dtype=torch.int8)
    for codec, g in BITS:
        packed = random_weights(size, size, g, codec)
        ours = Ours(packed, x, 1)
        dense = packed.dequantise()
        # Either order of the second matrix; the faster one is the peer.
        whole = packed.unpack()[0]
        orders = [whole.t(), whole.t().contiguous()]
        seconds = []
        for order in orders:
            torch._int_mm(quantised, order)
            start = time.perf_counter()
            torch._int_mm(quantised, order)
            seconds.append(time.perf_counter() - start)
        order = orders[seconds.index(min(seconds))]
        work = size * size * T / 1e9
        name = f"GEMM {T} tokens, {size} x {size}, {label(codec, g)}, {threads} threads"
        for peer, call, bar in (
            ("torch bf16 linear", lambda d=dense: torch.nn.functional.linear(half, d), 1.4),
            ("torch._int_mm alone", lambda o=order: torch._int_mm(quantised, o), 0.9),
        ):
            yield Case(name, "GMAC/s", work, ours, call, peer, gate(packed, x, None), bar=bar)


def training_cases(tokens: int = 2048) -> Iterator[Case]:
    """One optimiser step of SmolLM2-135M on real text, in bfloat16: ternary against plain."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = testbed.smollm2_path()
    text = "\n\n".join(
        document.text for document in itertools.islice(testbed.corpus("wikipedia"), 40)
    )
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0, :tokens]
    batch = ids.view(4, -1)

    def stepper(config: TernaryConfig | None) -> Callable[[], float]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).train()
        if config is not None:
            ternarize(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> float:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    def both_learn(ours: float, peer: float) -> None:
        assert 0 < peer < ours < 20, f"losses {ours} ternary, {peer} plain"

    for group in (64, -1):
        yield Case(
            f"training step, SmolLM2, {tokens} tokens, {label('ternary', group)}", "tokens/s",
            tokens, stepper(TernaryConfig(group_size=group)), stepper(None), "the step in bfloat16",
            both_learn, bar=1 / 1.15, repeats=5,
        )  # fmt: skip


def cases(only: list[str], quick: bool) -> Iterator[Case]:
    """All cases whose group's name holds one of `only`."""
    ggml, reason = ggml_peer.find()
    if ggml is None:
        print(f"without ggml's rows: {reason}")
    groups = {f"vector {t}": functools.partial(vector_cases, ggml, t, quick) for t in (2, 1)}
    for threads in (2, 1):
        for size in (2048, 4096):
            groups[f"matrix {threads} {size}"] = functools.partial(matrix_cases, threads, size)
    groups["training"] = training_cases
    for name, make in groups.items():
        if not only or any(text in name for text in only):
            yield from make()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no weights from memory")
    parser.add_argument(
        "--only", nargs="*", default=[],
        help='groups to run, such as "vector 2", "matrix", "training": others keep their old rows',
    )  # fmt: skip
    arguments = parser.parse_args()
    print(f"kernels: {required_kernels().level}")
    main("bitcpm", cases(arguments.only, arguments.quick), update=bool(arguments.only))
