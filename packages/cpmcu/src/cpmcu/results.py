"""What generation returns: the text, how it ended, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Cost of one generation. Seconds are wall time.

    `reused_tokens` of the prompt were still in the cache and cost nothing;
    `prefill_tokens_per_second` counts the others. The first new token comes from the prefill's
    logits, so `decode_tokens_per_second` counts `new_tokens` - 1. A rate of nothing is 0.
    `peak_memory_bytes` is the process's largest resident set so far.
    """

    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float
    peak_memory_bytes: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed per second."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second after the first."""
        return _rate(self.new_tokens - 1, self.decode_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All fields and both rates, as JSON values."""
        rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in rates}


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A finished generation.

    `token_ids` are all new tokens, an end-of-text token included; `text` is what they say,
    without special tokens, cut before a stop string. `finish_reason` is "stop" (end of text or
    stop string) or "length" (max_new_tokens or the context is full).
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats

    def to_dict(self) -> dict[str, Any]:
        """The generation as JSON values."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_dict(),
        }


class Score(NamedTuple):
    """Log-likelihood of a text: sum over `tokens` in nats, and the UTF-8 `bytes` they stand for."""

    log_likelihood: float
    tokens: int
    bytes: int


class Stream:
    """Iterator over the pieces of a generation as they appear; `result` after the last one.

    Closing it, or dropping it, ends the generation; what was computed stays in the engine's
    cache.
    """

    def __init__(self, pieces: Iterator[str], result: Callable[[], Generation | None]) -> None:
        self._pieces, self._result = pieces, result

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def result(self) -> Generation:
        """The whole generation; RuntimeError before the stream has ended."""
        result = self._result()
        if result is None:
            raise RuntimeError("the stream has not ended: iterate over all of it first")
        return result


class Clock:
    """Adds up the time spent inside `with clock:`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> Clock:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes (the present one where unknown)."""
    try:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().rss


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
