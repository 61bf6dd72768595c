"""One generation, step by step: prefill what is new, draw, decode, stop."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu.results import Clock, Generation, Stats, peak_memory
from cpmcu.sampling import Sampling, generator, sample
from cpmcu.stopping import StopStrings

if TYPE_CHECKING:
    from cpmcu.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A checked order: prompt `ids`, length, draw, seed and stop strings."""

    ids: list[int]
    max_new_tokens: int
    how: Sampling
    seed: int | None
    stop: tuple[str, ...]

    @classmethod
    def make(
        cls,
        *,
        ids: list[int],
        max_new_tokens: int,
        seed: int | None,
        stop: Sequence[str],
        **how: Any,
    ) -> Request:
        """Check the values; ValueError names the one that is wrong."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        StopStrings(stops)
        return cls(
            ids=ids, max_new_tokens=max_new_tokens, how=Sampling(**how), seed=seed, stop=stops
        )


class Running:
    """A generation under way. `result` is None until `pieces` is exhausted."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.result: Generation | None = None
        self._new: list[int] = []
        self._decode = Clock()

    def pieces(self) -> Iterator[str]:
        """Text as it becomes certain: whole characters, nothing that a stop string might cut."""
        engine, request, words = self.engine, self.request, self.engine.tokenizer
        stops, shown = StopStrings(request.stop), []
        text = words.stream() if words is not None else None
        prefill = Clock()
        with prefill:
            reused = engine.reusable(request.ids)
            engine.rollback(reused)
            logits = engine.feed(request.ids[reused:])
        reason = "length"
        for token in self._draw(logits):
            if self._ends(token):
                reason = "stop"
                break
            if piece := stops.feed(text.feed(token)) if text else "":
                shown.append(piece)
                yield piece
            if stops.stopped:
                reason = "stop"
                break
        if text and not stops.stopped and (piece := stops.feed(text.flush()) + stops.flush()):
            shown.append(piece)
            yield piece
        self.result = Generation(
            text="".join(shown),
            token_ids=self._new,
            finish_reason=reason,
            stats=Stats(
                prompt_tokens=len(request.ids),
                reused_tokens=reused,
                prefill_seconds=prefill.seconds,
                new_tokens=len(self._new),
                decode_seconds=self._decode.seconds,
                peak_memory_bytes=peak_memory(),
            ),
        )

    def _ends(self, token: int) -> bool:
        words = self.engine.tokenizer
        return token in self.engine.spec.eos or (words is not None and token in words.eos)

    def _drawn(self, logits: np.ndarray, numbers: random.Random) -> int:
        engine, request = self.engine, self.request
        # max propagates NaN, and +inf is its own maximum
        if not np.isfinite(logits.max()):
            raise ValueError(
                f"the logits at position {len(engine.tokens) - 1} are not finite: the "
                f"weights are damaged, or overflow in {engine.arithmetic} (try dtype='float32')"
            )
        previous = [*request.ids, *self._new] if request.how.repetition_penalty != 1 else ()
        return sample(logits, request.how, previous, numbers)

    def _draw(self, logits: np.ndarray) -> Iterator[int]:
        """New tokens, until the caller stops or the length or the context is used up."""
        engine, request = self.engine, self.request
        numbers = generator(request.seed)
        expected = len(request.ids)
        while len(self._new) < request.max_new_tokens:
            if len(engine.tokens) != expected:
                raise RuntimeError(
                    "the engine was used for something else while this text streamed"
                )
            with self._decode:
                if self._new:
                    logits = engine.feed(self._new[-1:])
                    expected += 1
                self._new.append(self._drawn(logits, numbers))
            yield self._new[-1]
            if len(engine.tokens) >= engine.max_context:
                return
