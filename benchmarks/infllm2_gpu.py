"""InfLLM v2's Triton kernels against FlashAttention on a CUDA GPU: each step alone, and together.

Random keys and queries: neighbouring tokens then share only the initial block and the window, the
worst case for kernels that load a block once for a tile of tokens. The bars are for MiniCPM4-8B's
shape with 64 visible blocks, of which the authors' own kernels were timed on an H100.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import RESULTS, Case, environment, measure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from infllm2 import InfLLMv2Config, backends, reference
from infllm2.compression import compress_keys

LENGTHS = (16384, 32768, 65536, 131072)
SHAPES = [(G, D) for D in (128, 64) for G in (16, 8, 4, 2)]
KV_HEADS = 2
# 32 blocks of window and 32 others; and the 96 that MiniCPM4 was trained with.
BLOCKS_64 = InfLLMv2Config(topk=32, dense_len=-1)
TRAINED = InfLLMv2Config(dense_len=-1)
BARS = {("forward", 65536): 2.5, ("forward", 131072): 4.5}
BARS |= {("backward", 65536): 2.3, ("backward", 131072): 3.8}
TOLERANCE = 2e-2  # largest difference from float32 that the gate lets through, of order one

Call = Callable[[], Any]
Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_peers() -> dict[str, Dense]:
    """Causal attention of [B, heads, length, D] by whatever fused kernels are installed."""
    found: dict[str, Dense] = {}
    for name, backend in (
        ("torch SDPA flash", SDPBackend.FLASH_ATTENTION),
        ("torch SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):

        def fused(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)

        found[name] = fused
    for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        try:
            function = __import__(module).flash_attn_func
        except (ImportError, AttributeError):
            continue

        def packed(q: Tensor, k: Tensor, v: Tensor, function: Any = function) -> Tensor:
            out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found[name] = packed
    return found


def cuda_seconds(call: Call) -> float:
    """One call, by CUDA events, with nothing of the last one in the cache."""
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def graphed(call: Call) -> Call:
    """The call as a CUDA graph, as servers decode: else Python would be timed."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def if_supported(call: Call) -> Any:
    """The result, or None where a peer's kernel does not know the shape."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def fastest(calls: dict[str, Call]) -> tuple[str, Call]:
    """The fastest of the peers that run."""
    calls = {name: call for name, call in calls.items() if if_supported(call) is not None}
    if not calls:
        raise ValueError("no dense attention here can run this shape")
    name = min(calls, key=lambda name: min(cuda_seconds(calls[name]) for _ in range(2)))
    return name, calls[name]


def assert_near(mine: Tensor, truth: Tensor, what: str) -> None:
    """The gate."""
    error = float((mine.detach().float() - truth.detach().float()).abs().max())
    worst = max(1.0, float(truth.abs().max()))
    assert error <= TOLERANCE * worst, f"{what} differs from the reference by {error}"


def gate(G: int, D: int) -> None:
    """Sets, output and all gradients of 2048 tokens, against the reference in float32."""
    config = InfLLMv2Config(window_size=512, topk=8, dense_len=-1)
    q, k, v = tensors(2048, 2048, G, D)
    triton = backends.get("triton")
    keys = compress_keys(k, config)
    blocks = triton.select(q, *keys, 2048, config)
    expected = reference.select_blocks(q, *keys, 2048, config)
    differ = float((blocks != expected).any(-1).float().mean())
    assert differ <= 1e-3, f"{differ:.2%} of the tokens visit other blocks than the reference's"
    results = []
    for run, dtype in ((triton.attend, q.dtype), (reference.block_sparse_attention, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = run(*leaves, blocks, block_size=64, scale=D**-0.5)
        results.append([out, *torch.autograd.grad(out, leaves, q.to(dtype))])
    for name, mine, truth in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_near(mine, truth, f"{name} (G={G}, D={D})")


def tensors(T: int, S: int, G: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in bfloat16."""
    torch.manual_seed(0)
    shapes = ((KV_HEADS * G, T), (KV_HEADS, S), (KV_HEADS, S))
    return tuple(torch.randn(1, h, n, D, device="cuda", dtype=torch.bfloat16) for h, n in shapes)


class Problem:
    """The cases of one shape: forward, backward, selection, prefill and decoding over S keys."""

    def __init__(self, S: int, G: int, D: int) -> None:
        self.S, self.sizes = S, {"block_size": 64, "scale": D**-0.5}
        self.q, self.k, self.v = tensors(S, S, G, D)
        self.keys = compress_keys(self.k, TRAINED)
        self.what = f"{S // 1024}K, {KV_HEADS * G}/{KV_HEADS}×{D}"
        self.bars = BARS if (G, D) == (16, 128) else {}
        self.peers = dense_peers()
        self.triton = backends.get("triton")
        self.steps = (self.forward, self.backward, self.selection, self.prefill, self.decode)

    def dense(self, q: Tensor) -> tuple[str, Call]:
        """The fastest dense attention of these queries."""
        calls = {n: lambda peer=p: peer(q, self.k, self.v) for n, p in self.peers.items()}
        return fastest(calls)

    def case(self, step: str, ours: Call, peer: tuple[str, Call], check: Any, work: int) -> Case:
        """A row."""
        bar = self.bars.get((step.split(",")[0], self.S))
        return Case(
            f"{step}, {self.what}", "tokens/s", work, ours, peer[1], peer[0], check, bar=bar
        )

    def check_rows(self, out: Tensor, blocks: Tensor, rows: int = 4) -> None:
        """The last rows of an output against the reference."""
        q, blocks = self.q[:, :, -rows:], blocks[:, :, -rows:]
        truth, _ = reference.block_sparse_attention(q, self.k, self.v, blocks, **self.sizes)
        assert_near(out[:, :, -rows:], truth, "the output")

    def forward(self) -> Case:
        """Attention over given blocks."""
        blocks = self.triton.select(self.q, *self.keys, self.S, BLOCKS_64)
        return self.case(
            "forward, 64 blocks",
            lambda: self.triton.attend(self.q, self.k, self.v, blocks, **self.sizes)[0],
            self.dense(self.q),
            lambda mine, _: self.check_rows(mine, blocks),
            self.S,
        )

    def backward(self) -> Case:
        """Gradients of q, k and v."""
        blocks = self.triton.select(self.q, *self.keys, self.S, BLOCKS_64)
        leaves = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        grad = torch.randn_like(self.q)
        out, _ = self.triton.attend(*leaves, blocks, **self.sizes)

        def gradients(of: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(of, leaves, grad, retain_graph=True)

        def check(mine: tuple[Tensor, ...], _: Any) -> None:
            tail = self.q[:, :, -4:].float().requires_grad_()
            truth, _ = reference.block_sparse_attention(
                tail, self.k.float(), self.v.float(), blocks[:, :, -4:], **self.sizes
            )
            (truth,) = torch.autograd.grad(truth, tail, grad[:, :, -4:].float())
            assert_near(mine[0][:, :, -4:], truth, "dq")
            assert all(x.isfinite().all() for x in mine), "a gradient is not finite"

        outs = {n: if_supported(lambda p=p: p(*leaves)) for n, p in self.peers.items()}
        peer = fastest({n: lambda o=o: gradients(o) for n, o in outs.items() if o is not None})
        return self.case("backward, 64 blocks", lambda: gradients(out), peer, check, self.S)

    def selection(self) -> Case:
        """No counterpart in dense attention: its cost in units of that."""

        def check(mine: Tensor, _: Any) -> None:
            q = self.q[:, :, -4:]
            expected = reference.select_blocks(q, *self.keys, self.S, TRAINED)
            same = (mine[:, :, -4:, :, None] == expected[:, :, :, None]).any(-1).float().mean()
            assert same > 0.98, f"only {float(same):.2%} of the blocks are the reference's"

        return self.case(
            "selection alone",
            lambda: self.triton.select(self.q, *self.keys, self.S, TRAINED),
            self.dense(self.q),
            check,
            self.S,
        )

    def both(self, q: Tensor, keys: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Selection and attention, as the model runs them; keys compressed before, or here."""
        keys = compress_keys(self.k, TRAINED) if keys is None else keys
        blocks = self.triton.select(q, *keys, self.S, TRAINED)
        return self.triton.attend(q, self.k, self.v, blocks, **self.sizes)[0], blocks

    def prefill(self) -> Case:
        """A prompt at once, compression and selection included."""
        return self.case(
            "prefill, 96 blocks",
            lambda: self.both(self.q, None),
            self.dense(self.q),
            lambda mine, _: self.check_rows(*mine),
            self.S,
        )

    def decode(self) -> Case:
        """One token, selection included; both sides as CUDA graphs."""
        one = self.q[:, :, -1:].contiguous()
        name, dense = self.dense(one)
        return self.case(
            "decode, 96 blocks",
            graphed(lambda: self.both(one, self.keys)),
            (name, graphed(dense)),
            lambda mine, _: self.check_rows(*mine, rows=1),
            1,
        )


def run() -> None:
    """Measure what fits into the GPU's memory, print a table, write the results, print them."""
    rows, skipped = [], []
    device = torch.cuda.get_device_name()
    print(f"{'case':<52} {'ours':>14} {'peer':>14} {'ratio':>7}  unit, peer")
    for G, D in SHAPES:
        gate(G, D)
        for S in LENGTHS:
            try:
                for step in Problem(S, G, D).steps:
                    row = measure(step(), seconds_of=cuda_seconds)
                    rows.append(row)
                    verdict = {None: "", True: ", passes", False: ", FAILS"}[row["pass"]]
                    print(
                        f"{row['name']:<52} {row['ours']:>14,.1f} {row['peer']:>14,.1f} "
                        f"{row['ratio']:>6.2f}×  {row['unit']}, {row['peer_name']}{verdict}",
                        flush=True,
                    )
            except torch.OutOfMemoryError:
                skipped.append(f"{S} keys, G={G}, D={D}: not enough GPU memory")
                print(f"skipped the rest of {skipped[-1]}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    env = environment()
    env["versions"]["triton"] = __import__("triton").__version__
    result = {"tool": "infllm2_gpu", "env": env, "rows": rows, "skipped": skipped}
    RESULTS.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = RESULTS / f"infllm2_gpu.{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("infllm2_gpu: no CUDA device here, nothing was measured")
        sys.exit()
    supported, reason = backends.get("triton").is_supported(
        backends.Inputs("cuda", torch.bfloat16, 32, KV_HEADS, 128)
    )
    if not supported:
        sys.exit(f"infllm2_gpu: the Triton kernels cannot run: {reason}")
    run()
