"""infllm2 on CPUs against what a user has today, and against its own dense kernel.

"The user's best" is the fastest of PyTorch's fused attention in every layout, grouped matrix
products and compiled FlexAttention, in bfloat16 and float32. Ours goes through the public call with
a cache: appending keys, compressing them, selection and attention are all timed. Key-value caches
rotate over more memory than the last-level cache holds, except in the rows that say "in cache".

A prompt is timed in pieces of 256 tokens spread evenly over it, as engines prefill; their sum
stands for the whole. A row of its own has 16K tokens in one call.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Case, main
from torch import Tensor

from infllm2 import InfLLMv2Config, LayerCache, infllmv2_attention, reference, select_blocks
from infllm2.selection import blocks_of

SPARSE = InfLLMv2Config(dense_len=-1)
DENSE = InfLLMv2Config(dense_len=1 << 40)
AUTO = InfLLMv2Config(dense_len="auto")
SHAPES = {(32, 2, 128): 1.0, (16, 2, 64): 0.8}  # heads, and how much of a bar counts
DECODE_USER = {16: 3, 32: 7, 64: 12, 128: 25}
DECODE_OWN = {16: 1.8, 32: 3.3, 64: 5.6, 128: 9}
DECODE_LIMIT = {16: 2.4, 32: 4.4, 64: 7.5, 128: 11.6}
PREFILL_USER = {32: 3, 64: 6, 128: 10}
PREFILL_OWN = {32: 1.6, 64: 2.8, 128: 5}
PREFILL_LIMIT = {32: 2.4, 64: 4.4, 128: 7.5}
ROTATE = 192 << 20  # bytes of keys and values that take turns
PIECE, PIECES = 256, 4
STRIDE = SPARSE.kernel_stride
FLEX = "FlexAttention compiled"
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


class Contexts:
    """Caches that take turns, and the new tokens they get.

    With T = 1, one call decodes `STRIDE` tokens on each cache, in turn, as many as pass until the
    next compressed key is complete; with more, it appends T tokens to one cache.

    Args:
        shape: query heads, key-value heads, head size.
        S: keys once the new tokens have come.
        T: tokens of a step.
        dtype: of everything.
        rotate: bytes that take turns; 0 for a single cache.
    """

    def __init__(
        self, shape: tuple[int, int, int], S: int, T: int, dtype: torch.dtype, rotate: int = ROTATE
    ) -> None:
        H, K, D = shape
        self.steps = STRIDE if T == 1 else 1
        self.before = S - self.steps * T
        self.bytes = 2 * S * K * D * dtype.itemsize
        generator = torch.Generator().manual_seed(S)

        def random(heads: int, length: int) -> Tensor:
            return torch.randn(1, heads, length, D, generator=generator).to(dtype)

        self.q, self.k, self.v = random(H, T), random(K, T), random(K, T)
        self.caches = []
        for _ in range(max(1, -(-rotate // self.bytes))):
            cache = LayerCache(SPARSE)
            cache.update(random(K, self.before), random(K, self.before))
            cache.compressed()
            for _ in range(self.steps):  # room for the new tokens
                cache.update(self.k, self.v)
            cache.crop(self.before)
            self.caches.append(cache)
        self.tokens = T if T > 1 else STRIDE * len(self.caches)
        self._turn = itertools.cycle(self.caches)

    def _each(self, call: Callable[[LayerCache], Tensor]) -> None:
        caches = self.caches if self.steps > 1 else [next(self._turn)]
        for _ in range(self.steps):
            for cache in caches:
                call(cache)
        for cache in caches:
            cache.crop(self.before)

    def attend(self, config: InfLLMv2Config) -> None:
        """Append and attend, by the tool."""
        self._each(lambda c: infllmv2_attention(self.q, self.k, self.v, config, cache=c))

    def user(self, way: Way) -> None:
        """Append to the same cache and attend, in a way PyTorch offers."""
        self._each(lambda c: way(self.q, *c.update(self.k, self.v)))


def user_ways(T: int) -> dict[str, Way]:
    """What PyTorch offers for T queries at the end of S keys; none masks inside the last T."""

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        K = k.shape[1]
        rows = q.view(B, K, H // K * T, D)
        return F.scaled_dot_product_attention(rows, k, v).view(B, H, T, D)

    def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *k.shape[2:])
        k, v = (x.unsqueeze(2).expand(shape).flatten(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        rows = q.view(B, k.shape[1], -1, D) * D**-0.5
        return ((rows @ k.transpose(-1, -2)).softmax(-1) @ v).view(B, H, T, D)

    def gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    ways = {"SDPA folded": folded, "SDPA enable_gqa": gqa, "grouped matmul": grouped}
    if T > 1:  # copies all keys, hopeless for one query
        ways["SDPA expanded"] = expanded
        ways.pop("grouped matmul")  # holds all logits
    flex = flex_attention()
    if flex is not None:
        ways[FLEX] = functools.partial(flex, enable_gqa=True)
    return ways


@functools.cache
def flex_attention() -> Callable[..., Tensor] | None:
    """Compiled FlexAttention, or None where it does not compile."""
    from torch.nn.attention.flex_attention import flex_attention as eager

    compiled = torch.compile(eager, dynamic=True)  # decoding has another length at every step
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 256, 64)
    try:
        compiled(q, k, k, enable_gqa=True)
    except Exception as error:  # noqa: BLE001  # whatever the compiler raises, there is no such peer
        print(f"FlexAttention does not compile here: {str(error).splitlines()[0][:100]}")
        return None
    return compiled


# Shapes and T for which FlexAttention lost clearly: compiling it takes long.
FLEX_LOST: set[tuple[tuple[int, int, int], int]] = set()


def fastest(shape: tuple[int, int, int], S: int, T: int) -> tuple[str, Way, torch.dtype]:
    """The user's best for this shape and length: its name, the function and its dtype."""
    times: dict[tuple[str, torch.dtype], tuple[float, Way]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        contexts = Contexts(shape, S, T, dtype)
        for name, way in user_ways(T).items():
            if name == FLEX and (shape, T) in FLEX_LOST:
                continue
            try:
                call = functools.partial(contexts.user, way)
                seconds = min(timed(call) for _ in range(2))
            except Exception as error:  # noqa: BLE001  # a way that cannot run here is not the best
                print(f"{name} does not run: {str(error).splitlines()[0][:100]}")
                continue
            times[name, dtype] = seconds, way
    (name, dtype), (best, way) = min(times.items(), key=lambda item: item[1][0])
    flex = [seconds for (n, _), (seconds, _) in times.items() if n == FLEX]
    if not flex or min(flex) > 1.3 * best:
        FLEX_LOST.add((shape, T))
    return f"{name}, {str(dtype)[6:]}", way, dtype


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gate(contexts: Contexts) -> Callable[[object, object], None]:
    """Refuses a wrong result: the last query's blocks and output against the paper in float64."""

    def check(ours: object, peer: object) -> None:
        cache = contexts.caches[0]
        keys, values = cache.update(contexts.k, contexts.v)
        length, known, q = cache.length, cache.compressed(), contexts.q[:, :, -1:]
        blocks = select_blocks(contexts.q, keys, SPARSE)[:, :, -1:]
        out = infllmv2_attention(contexts.q, keys, values, SPARSE)[:, :, -1:]
        cache.crop(contexts.before)
        wanted = reference.select_blocks(
            q.double(), known.fine.double(), known.coarse.double(), length, SPARSE
        )
        assert torch.equal(blocks, wanted), "the chosen blocks are not the paper's"
        truth, _ = reference.block_sparse_attention(
            q.double(), keys.double(), values.double(), wanted, block_size=SPARSE.block_size,
            scale=q.shape[-1] ** -0.5,
        )  # fmt: skip
        error = float((out.double() - truth).abs().max())
        assert error < 2e-2, f"the output is off by {error}"

    return check


def no_gate(ours: object, peer: object) -> None:
    """For rows whose two sides compute different things; the sparse side has its own gate."""


def label(shape: tuple[int, int, int], K: int) -> str:
    """For example "32/2 x 128, 16K"."""
    return f"{shape[0]}/{shape[1]} x {shape[2]}, {K}K"


def read_bandwidth() -> float:
    """Bytes a second that PyTorch's own sum reads, on all threads."""
    x = torch.randn(64 << 20)
    return x.numel() * 4 / min(timed(x.sum) for _ in range(9))


def matmul_peak() -> float:
    """bfloat16 FLOP a second of the best square matrix product."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(2, n, n).bfloat16()
        best = max(best, 2 * n**3 / min(timed(lambda a=a, b=b: a @ b) for _ in range(6)))
    return best


def decode_cases(shape: tuple[int, int, int], lengths: list[int], bandwidth: float) -> list[Case]:
    """One token: sparse against the user's best and our dense; our dense against the memory."""
    part, found = SHAPES[shape], []
    for K in lengths:
        contexts = Contexts(shape, K << 10, 1, torch.bfloat16)
        ours, dense = (functools.partial(contexts.attend, c) for c in (SPARSE, DENSE))
        name, way, dtype = fastest(shape, K << 10, 1)
        theirs = contexts if dtype == torch.bfloat16 else Contexts(shape, K << 10, 1, dtype)
        peer = functools.partial(theirs.user, way)
        at = label(shape, K)
        found.append(
            Case(f"decode {at}", "tokens/s", contexts.tokens, ours, peer, f"user's best: {name}",
                 gate(contexts), bar=DECODE_USER[K] * part)
        )  # fmt: skip
        found.append(
            Case(f"decode {at}", "tokens/s", contexts.tokens, ours, dense,
                 f"our dense (limit {DECODE_LIMIT[K]}x)", no_gate, bar=DECODE_OWN[K] * part)
        )  # fmt: skip
        found.append(
            Case(f"dense decode {at}, of {bandwidth / 1e9:.1f} GB/s read", "GB/s",
                 contexts.bytes / 1e9 * contexts.tokens, dense, peer, f"user's best: {name}",
                 no_gate, bound=bandwidth / 1e9)
        )  # fmt: skip
    return found


def cached_cases(shape: tuple[int, int, int]) -> list[Case]:
    """One token over keys that the last-level cache holds."""
    contexts = Contexts(shape, 16 << 10, 1, torch.bfloat16, rotate=0)
    ours, dense = (functools.partial(contexts.attend, c) for c in (SPARSE, DENSE))
    return [
        Case(f"decode {label(shape, 16)}, in cache", "tokens/s", contexts.tokens, ours, dense,
             "our dense", no_gate)
    ]  # fmt: skip


def switch_cases(shape: tuple[int, int, int]) -> list[Case]:
    """`dense_len="auto"` against our dense, around the switch: never more than 5 % slower."""
    found = []
    for K in (7, 8, 10, 12):
        for T, kind in ((1, "decode"), (PIECE, "prefill")):
            contexts = Contexts(shape, K << 10, T, torch.bfloat16)
            auto, dense = (functools.partial(contexts.attend, c) for c in (AUTO, DENSE))
            auto()  # the measurement
            found.append(
                Case(f"{kind} {label(shape, K)}, dense_len=auto", "tokens/s", contexts.tokens, auto,
                     dense, "our dense", no_gate, bar=0.95)
            )  # fmt: skip
    return found


def in_turn(calls: list[Callable[[], object]]) -> None:
    """All of them."""
    for call in calls:
        call()


def prefill_cases(shape: tuple[int, int, int], lengths: list[int], peak: float) -> list[Case]:
    """A prompt in pieces at the middles of its quarters."""
    (H, K, D), part, found = shape, SHAPES[shape], []
    # One key-value head with its group: every head costs the same.
    one = (H // K, 1, D)
    for length in lengths:
        ends = [(length << 10) * (2 * i + 1) // (2 * PIECES) + PIECE for i in range(PIECES)]
        contexts = [Contexts(one, S, PIECE, torch.bfloat16, rotate=0) for S in ends]
        name, way, dtype = fastest(one, ends[-1], PIECE)
        theirs = contexts
        if dtype != torch.bfloat16:
            theirs = [Contexts(one, S, PIECE, dtype, rotate=0) for S in ends]
        ours, dense, user = (
            functools.partial(in_turn, calls)
            for calls in (
                [functools.partial(c.attend, SPARSE) for c in contexts],
                [functools.partial(c.attend, DENSE) for c in contexts],
                [functools.partial(c.user, way) for c in theirs],
            )
        )
        at, tokens = f"{H // K}/1 x {D}, {length}K", PIECE * PIECES
        found.append(
            Case(f"prefill {at}", "tokens/s", tokens, ours, user, f"user's best: {name}",
                 gate(contexts[-1]), bar=PREFILL_USER[length] * part, repeats=5)
        )  # fmt: skip
        found.append(
            Case(f"prefill {at}", "tokens/s", tokens, ours, dense,
                 f"our dense (limit {PREFILL_LIMIT[length]}x)", no_gate,
                 bar=PREFILL_OWN[length] * part, repeats=5)
        )  # fmt: skip
        flops = sum(4 * H // K * D * PIECE * (S - PIECE / 2) for S in ends)
        found.append(
            Case(f"dense prefill {at}, of {peak / 1e9:.0f} GFLOP/s matmul", "GFLOP/s", flops / 1e9,
                 dense, user, f"user's best: {name}", no_gate, bound=peak / 1e9, repeats=5)
        )  # fmt: skip
    return found


def selection_cases() -> list[Case]:
    """The approximate normaliser against the exact one: selection of a piece of a long prompt."""
    found = []
    for shape in SHAPES:
        contexts = Contexts(shape, 64 << 10, PIECE, torch.bfloat16, rotate=0)
        cache = contexts.caches[0]
        keys = cache.update(contexts.k, contexts.v)[0]
        known = cache.compressed()
        approx, exact = (
            functools.partial(blocks_of, contexts.q, keys, InfLLMv2Config(lse=lse), keys=known)
            for lse in ("approx", "exact")
        )
        both = [
            blocks_of(contexts.q, keys, InfLLMv2Config(lse=x), keys=known)
            for x in ("approx", "exact")
        ]
        hits = [
            len(set(a) & set(b)) / len(b)
            for a, b in zip(*(x.flatten(0, 2).tolist() for x in both), strict=True)
        ]
        found.append(
            Case(f"selection {label(shape, 64)}, approximate LSE (sets {sum(hits) / len(hits):.0%} "
                 "equal)", "tokens/s", PIECE, approx, exact, "exact LSE", no_gate, bar=1.3)
        )  # fmt: skip
    return found


def training_cases(shape: tuple[int, int, int], S: int = 16 << 10) -> list[Case]:
    """Forward and backward of one group at 16K tokens against PyTorch's fused attention."""
    H, K, D = shape
    G = H // K
    steps = {}
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(1, h, S, D).to(dtype).requires_grad_() for h in (G, 1, 1))
        grad = torch.randn(1, G, S, D).to(dtype)

        def step(attend: Way, leaves=(q, k, v), grad=grad) -> None:
            for x in leaves:
                x.grad = None
            attend(*leaves).backward(grad)

        steps[dtype] = step

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.expand_as(q), v.expand_as(q)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    best = min(steps, key=lambda dtype: timed(functools.partial(steps[dtype], fused)))
    ours = functools.partial(steps[torch.bfloat16], sparse_call)
    return [
        Case(f"training step {G}/1 x {D}, {S >> 10}K", "tokens/s", S, ours,
             functools.partial(steps[best], fused), f"SDPA expanded, causal, {str(best)[6:]}",
             no_gate, bar=2.0, repeats=5)
    ]  # fmt: skip


def sparse_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """InfLLM v2 over a whole sequence."""
    return infllmv2_attention(q, k, v, SPARSE)


def whole_case(shape: tuple[int, int, int]) -> Case:
    """16K tokens in one call, both sides causal: checks the pieces."""
    (H, K, D), S = shape, 16 << 10
    q, k, v = (torch.randn(1, h, S, D).bfloat16() for h in (H // K, 1, 1))
    return Case(
        f"prefill {H // K}/1 x {D}, 16K in one call", "tokens/s", S,
        lambda: sparse_call(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True),
        "SDPA expanded, causal, bfloat16", no_gate, repeats=5,
    )  # fmt: skip


def run(quick: bool, only: list[str]) -> None:
    """Build and measure the cases group by group, so that one group's memory is free again."""
    bandwidth, peak = read_bandwidth(), matmul_peak()
    decode, prefill = ([16], []) if quick else ([16, 32, 64, 128], [32, 64, 128])
    groups: dict[str, Callable[[], list[Case]]] = {}
    for shape in SHAPES:
        for K in decode:
            groups[f"decode {shape} {K}"] = functools.partial(decode_cases, shape, [K], bandwidth)
        groups[f"decode {shape} in cache"] = functools.partial(cached_cases, shape)
        groups[f"switch {shape}"] = functools.partial(switch_cases, shape)
        for K in prefill:
            groups[f"prefill {shape} {K}"] = functools.partial(prefill_cases, shape, [K], peak)
    groups["selection"] = selection_cases
    for shape in SHAPES:
        groups[f"training {shape}"] = functools.partial(training_cases, shape)
        groups[f"whole {shape}"] = lambda shape=shape: [whole_case(shape)]
    chosen = [make for name, make in groups.items() if not only or any(o in name for o in only)]
    main("infllm2", itertools.chain.from_iterable(make() for make in chosen), update=bool(only))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="decoding at 16K only")
    parser.add_argument(
        "--only", nargs="*", default=[], help="groups, such as decode; others keep their rows"
    )
    options = parser.parse_args()
    run(options.quick, options.only)
