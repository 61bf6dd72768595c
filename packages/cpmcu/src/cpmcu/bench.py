"""Time prefill and decode of one engine: medians of fresh runs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from cpmcu.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Tokens per second: of a prefill of `prompt_tokens`, and of decoding after it."""

    prompt_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    repeats: int

    def to_dict(self) -> dict[str, float]:
        """The row as JSON values."""
        return asdict(self)


def run(
    engine: Engine,
    lengths: Sequence[int],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """One row per prompt length, after a warm-up; random prompts, so no prefix is ever reused.

    Raises:
        ValueError: a count below 1, or a length that leaves no room for `new_tokens`.
    """
    for name, value in (
        ("new_tokens", new_tokens),
        ("repeats", repeats),
        *(("length", n) for n in lengths),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max(lengths) + new_tokens > engine.max_context:
        raise ValueError(
            f"{max(lengths)} + {new_tokens} tokens are above max_context={engine.max_context}"
        )
    numbers = random.Random(0)
    rows = []
    done, total = 0, len(lengths) * (repeats + 1)
    for length in lengths:
        prefill, decode = [], []
        for repeat in range(repeats + 1):
            ids = [numbers.randrange(engine.spec.vocab) for _ in range(length)]
            engine.reset()
            start = time.perf_counter()
            logits = engine.feed(ids)
            middle = time.perf_counter()
            for _ in range(new_tokens):
                logits = engine.feed([int(logits.argmax())])
            end = time.perf_counter()
            if repeat:  # the first run warms up
                prefill.append(length / (middle - start))
                decode.append(new_tokens / (end - middle))
            done += 1
            if progress is not None:
                progress(done, total)
        rows.append(
            Row(
                prompt_tokens=length,
                prefill_tokens_per_second=statistics.median(prefill),
                decode_tokens_per_second=statistics.median(decode),
                repeats=repeats,
            )
        )
    engine.reset()
    return rows
