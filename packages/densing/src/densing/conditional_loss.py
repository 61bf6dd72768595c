"""Conditional loss, -log P(answer | prompt), of any causal transformers model. Densing Law §2.2.

Only the answer's tokens count; the prompt is context. For multiple choice the paper's answer is a
rationale and the label. Losses per token are comparable between models of one tokenizer only;
per byte, between all. torch and transformers are imported when a model is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from densing.pairs import Pair, pairs_hash, resume


@dataclass(frozen=True)
class ConditionalLoss:
    """The loss of one model on a set of pairs.

    Attributes:
        nats: sum over all answer tokens. tokens, bytes: of the answers that were measured.
        items: answers measured. excluded: item -> why not (an answer longer than the context).
        truncated: prompts cut at the left to fit the context.
        straddled: items whose tokens run across the boundary of prompt and answer; the loss then
            contains a little of the prompt.
        tokenizer: hash of the vocabulary. data_sha256: of the pairs.
    """

    nats: float
    tokens: int
    bytes: int
    items: int
    excluded: dict[str, str]
    truncated: int
    straddled: int
    tokenizer: str
    data_sha256: str

    @property
    def per_token(self) -> float:
        """Nats per answer token."""
        return self.nats / self.tokens

    @property
    def per_byte(self) -> float:
        """Nats per byte of answer text (UTF-8)."""
        return self.nats / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the units in the keys."""
        return {
            **asdict(self),
            "nats_per_token": self.per_token,
            "nats_per_byte": self.per_byte,
        }


def measure_conditional_loss(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConditionalLoss:
    """Measure a causal language model; goes on from what `out` holds.

    Args:
        model: `transformers` causal model, in eval mode, on any device.
        tokenizer: its tokenizer.
        pairs: what to measure. Their order does not matter.
        batch_size: pairs in one forward pass; results do not depend on it beyond rounding.
        max_length: of prompt and answer in tokens; the model's context by default.
        out: JSON lines with each item's own loss, written batch by batch; a run that was killed
            goes on from it.
        progress: called with (pairs done, pairs in all).

    Raises:
        ValueError: `out` belongs to other pairs or another tokenizer; no answer fits the context;
            a loss that is not finite.
    """
    import torch

    limit = max_length or _context(model)
    digest = pairs_hash(pairs)
    header = {"data_sha256": digest, "tokenizer": _vocabulary_hash(tokenizer), "limit": limit}
    done = resume(Path(out), header) if out else {}
    excluded: dict[str, str] = {}
    rows = []
    for pair in pairs:
        if pair.id in done:
            continue
        ids, start, straddles = encode(tokenizer, pair)
        answer = len(ids) - start
        if answer > limit - 1:
            excluded[pair.id] = f"{answer} answer tokens do not fit a context of {limit}"
            continue
        cut = max(0, len(ids) - limit)
        rows.append((pair, ids[cut:], start - cut, cut > 0, straddles))
    # Alike lengths share a batch, so that little is spent on padding.
    rows.sort(key=lambda row: (len(row[1]), row[0].id))
    stream = Path(out).open("a", encoding="utf-8") if out else None
    finished = len(done)
    try:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            with torch.inference_mode():
                losses = _forward(model, [r[1] for r in batch], [r[2] for r in batch])
            for (pair, ids, start, cut_off, straddles), nats in zip(batch, losses, strict=True):
                if nats != nats or nats in (float("inf"), float("-inf")):
                    raise ValueError(f"pair {pair.id}: the loss is {nats}; are the weights whole?")
                done[pair.id] = {
                    "id": pair.id,
                    "nats": nats,
                    "tokens": len(ids) - start,
                    "bytes": len(pair.answer.encode()),
                    "truncated": cut_off,
                    "straddles": straddles,
                }
                if stream:
                    stream.write(json.dumps(done[pair.id]) + "\n")
            if stream:
                stream.flush()
            finished += len(batch)
            progress(finished, len(pairs))
    finally:
        if stream:
            stream.close()
    # In the order of the pairs, so that a resumed run adds up to the same bits.
    measured = [done[pair.id] for pair in pairs if pair.id in done]
    if not measured:
        raise ValueError(f"no answer fits a context of {limit} tokens")
    return ConditionalLoss(
        nats=sum(m["nats"] for m in measured),
        tokens=sum(m["tokens"] for m in measured),
        bytes=sum(m["bytes"] for m in measured),
        items=len(measured),
        excluded=excluded,
        truncated=sum(m["truncated"] for m in measured),
        straddled=sum(m["straddles"] for m in measured),
        tokenizer=header["tokenizer"],
        data_sha256=digest,
    )


def encode(tokenizer: Any, pair: Pair) -> tuple[list[int], int, bool]:
    """Ids of prompt and answer, where the answer starts, and whether a token runs across.

    Both are encoded together, as the model saw text in training; where that changes the prompt's
    own last tokens, those count to the answer.

    Raises:
        ValueError: an empty prompt and a tokenizer without any token to start from.
    """
    prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
    both = tokenizer(pair.prompt + pair.answer, add_special_tokens=False)["input_ids"]
    start = 0
    while start < min(len(prompt), len(both)) and prompt[start] == both[start]:
        start += 1
    straddles = start < len(prompt)
    begin = tokenizer.bos_token_id
    usual = tokenizer("a")["input_ids"]
    if begin is not None and usual[:1] == [begin]:
        return [begin, *both], start + 1, straddles
    if start == 0:  # something must stand before the first token that is predicted
        begin = begin if begin is not None else tokenizer.eos_token_id
        if begin is None:
            raise ValueError(
                f"pair {pair.id}: an empty prompt needs a tokenizer with a start token"
            )
        return [begin, *both], 1, straddles
    return list(both), start, straddles


def _forward(model: Any, ids: list[list[int]], starts: list[int]) -> list[float]:
    """Sum of -log p over each row's answer tokens, in float32 logits."""
    import torch

    longest = max(map(len, ids))
    device = next(model.parameters()).device
    tokens = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    logits = model(
        input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False
    ).logits
    losses = []
    for i, (row, start) in enumerate(zip(ids, starts, strict=True)):
        wanted = torch.tensor(row[start:], device=device)
        # Only the answer's rows are widened: a prompt's logits can be hundreds of megabytes.
        log_p = torch.log_softmax(logits[i, start - 1 : len(row) - 1].float(), dim=-1)
        picked = log_p.gather(1, wanted[:, None])
        losses.append(-float(picked.double().sum()))
    return losses


def runs_table(
    results: Iterable[tuple[float, float, ConditionalLoss]], unit: str = "per_byte"
) -> dict[str, list[float]]:
    """A ladder's `parameters`, `tokens` and `loss`, ready for `fit_reference`.

    Args:
        results: (parameters, training tokens, loss) of each model.
        unit: "per_byte", or "per_token" where all share one tokenizer.

    Raises:
        ValueError: losses on different pairs, or per token with different tokenizers.
    """
    rows = list(results)
    if unit not in ("per_byte", "per_token"):
        raise ValueError(f"unit must be per_byte or per_token, got {unit!r}")
    if len({r[2].data_sha256 for r in rows}) > 1:
        raise ValueError("the losses were measured on different pairs: measure all on the same")
    if unit == "per_token" and len({r[2].tokenizer for r in rows}) > 1:
        raise ValueError(
            "losses per token of different tokenizers cannot be compared: use unit='per_byte'"
        )
    return {
        "parameters": [r[0] for r in rows],
        "tokens": [r[1] for r in rows],
        "loss": [getattr(r[2], unit) for r in rows],
    }


def _context(model: Any) -> int:
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if limit else 1 << 30


def _vocabulary_hash(tokenizer: Any) -> str:
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]
