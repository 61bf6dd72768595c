"""APB's prefill and decode of one attention layer in plain PyTorch, never optimised.

B: batch; Hq, Hkv: query and KV heads, Hq = G * Hkv, query head i reads KV head i // G; T: tokens,
the query's and then the document's; D: head dimension; P, A, L: keys passed, of the anchor, local.
Source: "APB: Accelerating Distributed Long-Context Inference by Passing Compressed Context Blocks
across GPUs" (arXiv 2502.12085, ACL 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from apb.checks import check_qkv
from apb.compressors import Compressor
from apb.config import APBConfig
from apb.merge import merge_lse


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """One layer's prefill.

    out [B, Hq, T, D]: attention of every token, in q's dtype. Query rows come from the anchor,
        document rows from the host that owns the token.
    anchor_out [B, Hq, A, D]: the anchor's rows, the same on every host but the first.
    kv: for each host, k and v [B, Hkv, L, D] of its whole block: what decode reads. Views of the
        input; passed and anchor keys are not kept.
    passed: for each host, document positions [B, Hkv, P] of what it passes on, ascending.
    bytes_passed: for each host, bytes it sends: k and v, in the input's dtype, to each later host.
    flops: for each host, 4 D a visible pair of query row and key, query head and batch row; the
        projections, the softmax and the compressor's own work are not in it.
    """

    out: Tensor
    anchor_out: Tensor
    kv: tuple[tuple[Tensor, Tensor], ...]
    passed: tuple[Tensor, ...]
    bytes_passed: tuple[int, ...]
    flops: tuple[int, ...]


@torch.no_grad()
def apb_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: APBConfig,
    *,
    compressor: Compressor,
    query_length: int = 0,
) -> PrefillResult:
    """Prefill one attention layer on `config.hosts` virtual hosts, in float32 or better.

    q [B, Hq, T, D]; k, v [B, Hkv, T, D]: floating, one dtype, positions (RoPE) already applied. The
    first `query_length` tokens are the anchor's copy of the query, the others the document.
    compressor: scores each block's tokens; the last host has nobody to pass to and is not asked.

    The anchor is A = [query, first l_a document tokens], as in the paper; the authors' code counts
    the query within l_a. The first host has no anchor, so its rows do not see the query.
    Raises ValueError for shapes, lengths or scores that do not fit.
    """
    check_qkv(q, k, v, same_tokens=True)
    if not 0 <= query_length < q.shape[2]:
        raise ValueError(
            f"query_length must leave document tokens: expected 0 to {q.shape[2] - 1} for "
            f"{q.shape[2]} tokens, got {query_length}"
        )
    if query_length and config.hosts == 1:
        raise ValueError(
            f"query_length={query_length} needs hosts >= 2: a single host has no anchor to hold "
            "the query; pass query_length=0 and the document alone"
        )
    lengths = config.lengths(q.shape[2] - query_length)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BHTD, k_BHTD, v_BHTD = q.to(dtype), k.to(dtype), v.to(dtype)
    starts = list(accumulate(lengths.blocks, initial=query_length))
    anchor_end = query_length + lengths.anchor if config.hosts > 1 else 0

    out = torch.empty_like(q_BHTD)
    anchor_out = q_BHTD[:, :, :0]
    passed_k, passed_v, passed, bytes_passed, flops, kv = [], [], [], [], [], []
    for host, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        # 1. The anchor goes before the local block on every host but the first.
        anchor = anchor_end if host else 0
        own = [
            torch.cat([x[:, :, :anchor], x[:, :, start:end]], 2) for x in (q_BHTD, k_BHTD, v_BHTD)
        ]
        # 2. Attend over [passing | anchor | local] (what earlier hosts passed is already here).
        keys, values = torch.cat([*passed_k, own[1]], 2), torch.cat([*passed_v, own[2]], 2)
        mask = prefill_mask(keys.shape[2] - own[1].shape[2], anchor, end - start).to(q.device)
        rows, _ = masked_attention(own[0], keys, values, mask)
        anchor_out = rows[:, :, :anchor] if host else anchor_out
        out[:, :, start:end] = rows[:, :, anchor:]
        flops.append(4 * q.shape[3] * q.shape[0] * q.shape[1] * int(mask.sum()))
        kv.append((k[:, :, start:end], v[:, :, start:end]))
        # 3. Compress: the first l_a document tokens stay at home, as they are in every anchor.
        later = config.hosts - 1 - host
        block = [x[:, :, start:end] for x in (q_BHTD, k_BHTD, v_BHTD)]
        scores = compressor(*block, query=q_BHTD[:, :, :query_length], host=host) if later else None
        at_home = max(anchor_end - start, 0)
        index = select_passing(scores, block[1], at_home, lengths.passing, config.pool_kernel)
        # 4. Pass on, to later hosts only: no earlier row may see these keys.
        where = index.unsqueeze(-1).expand(-1, -1, -1, q.shape[3])
        passed_k.append(block[1].gather(2, where))
        passed_v.append(block[2].gather(2, where))
        passed.append(index + (start - query_length))
        bytes_passed.append(2 * where.numel() * k.element_size() * later)
    out[:, :, :query_length] = anchor_out[:, :, :query_length]
    return PrefillResult(
        out=out.to(q.dtype),
        anchor_out=anchor_out.to(q.dtype),
        kv=tuple(kv),
        passed=tuple(passed),
        bytes_passed=tuple(bytes_passed),
        flops=tuple(flops),
    )


def prefill_mask(passing: int, anchor: int, local: int) -> Tensor:
    """Mask M': what rows [anchor | local] may see of keys [passing | anchor | local].

    Anchor rows see the anchor causally; local rows see all that was passed, all of the anchor, and
    their own block causally. Returns bool [anchor + local, passing + anchor + local], True = seen.
    """
    mask = torch.ones(anchor + local, anchor + local, dtype=torch.bool).tril()
    before = torch.ones(anchor + local, passing, dtype=torch.bool)
    before[:anchor] = False
    return torch.cat([before, mask], 1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [B, Hq, M, D] over k, v [B, Hkv, N, D], scaled by 1 / sqrt(D).

    mask: bool [M, N], True = seen. Returns out [B, Hq, M, D] and lse [B, Hq, M], the natural
    log-sum-exp of the seen logits; a row that sees nothing gives 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k_BHND, v_BHND = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q @ k_BHND.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    # Not exp(logits - lse): at 10000 a float32 lse is only good to 0.0005.
    weights = logits.softmax(-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return weights @ v_BHND, lse


@torch.no_grad()
def distributed_decode(q: Tensor, kv_per_host: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attend exactly over keys that stay on their hosts (Star attention's phase 2).

    q [B, Hq, M, D]: the newest M tokens. kv_per_host: k and v [B, Hkv, L, D] for each host, L may
    be 0. New tokens live on the last host: if M > 1 its last M keys are those of q's own tokens,
    and row i does not see those after its own. Returns [B, Hq, M, D] in q's dtype.
    Raises ValueError for shapes that do not fit or when there is no key at all.
    """
    for host, (k, v) in enumerate(kv_per_host):
        check_qkv(q, k, v, same_tokens=False, where=f"kv_per_host[{host}]: ")
    if not any(k.shape[2] for k, _ in kv_per_host):
        raise ValueError("kv_per_host holds no key; pass the kv of apb_prefill's result")
    rows, last = q.shape[-2], len(kv_per_host) - 1
    outs, lses = [], []
    for host, (k, v) in enumerate(kv_per_host):
        if host == last and rows > max(k.shape[2], 1):
            raise ValueError(
                f"kv_per_host[{host}] holds {k.shape[2]} tokens and q has {rows} rows; append the "
                f"keys and values of q's tokens to the last host first"
            )
        mask = torch.ones(rows, k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - rows) if host == last and rows > 1 else mask
        dtype = torch.promote_types(q.dtype, torch.float32)
        out, lse = masked_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
        outs.append(out)
        lses.append(lse)
    return merge_lse(outs, lses)[0].to(q.dtype)


def select_passing(scores: Tensor | None, k: Tensor, at_home: int, count: int, pool: int) -> Tensor:
    """Positions in the block [B, Hkv, P] of the best tokens of each KV head, ascending."""
    if scores is None:
        return torch.empty((*k.shape[:2], 0), dtype=torch.long, device=k.device)
    if scores.shape != k.shape[:3] or bool(scores.isnan().any()):
        raise ValueError(
            f"the compressor must return scores of shape {tuple(k.shape[:3])} without NaN, got "
            f"{tuple(scores.shape)}{' with NaN' if scores.isnan().any() else ''}; correct it"
        )
    pooled = functional.max_pool1d(scores.to(k.dtype), pool, stride=1, padding=pool // 2)
    # A stable sort, as pooling makes ties: they go to the earlier token.
    order = pooled[:, :, at_home:].argsort(dim=-1, descending=True, stable=True)
    return order[:, :, :count].sort(-1).values + at_home
