"""Choose the next token from logits: one pure function over a 1-D tensor, one for the draw.

Order and semantics follow transformers: repetition penalty (arXiv:1909.05858), temperature,
top-k (arXiv:1805.04833), top-p (arXiv:1904.09751), min-p (arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FEW = 512  # tokens among which the likeliest are looked for first


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to draw. The defaults are greedy; `temperature` 0 ignores top_p, top_k and min_p.

    temperature >= 0; 0 < top_p <= 1; top_k >= 0 (0: off); 0 <= min_p <= 1;
    repetition_penalty > 0 (1: off). ValueError outside these ranges.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges. Written so that NaN fails too."""
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "an integer >= 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a number > 0"),
        ):
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


def penalise(logits: Tensor, penalty: float, previous: Sequence[int]) -> Tensor:
    """Logits [V] with those of `previous` tokens divided by `penalty` (multiplied if negative)."""
    if penalty == 1.0 or not previous:
        return logits
    seen = torch.tensor(sorted(set(previous)))
    values = logits[seen]
    values = torch.where(values < 0, values * penalty, values / penalty)
    return logits.index_copy(0, seen, values)


def probabilities(logits: Tensor, how: Sampling, previous: Sequence[int] = ()) -> Tensor:
    """The distribution to draw from, fp32 [V]: sums to 1, zero outside what the filters keep.

    Args:
        logits: finite or -inf, [V].
        how: `temperature` 0 gives all mass to the largest logit (lowest index on a tie).
        previous: tokens of the prompt and the text so far, for the repetition penalty.
    """
    logits = penalise(logits.float(), how.repetition_penalty, previous)
    if how.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # The maximum first: dividing by a tiny temperature must not overflow to inf - inf.
    logits = (logits - logits.max()) / how.temperature
    if 0 < how.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
    if how.top_p < 1:
        logits = _nucleus(logits, how.top_p)
    if how.min_p > 0:
        p = logits.softmax(0)
        logits = logits.masked_fill(p < how.min_p * p.max(), -torch.inf)
    return logits.softmax(0)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf for all but the likeliest tokens that together reach `top_p`.

    They are nearly always few, and the largest of a vocabulary are found in a tenth of the time
    that sorting it takes.
    """
    whole = logits.logsumexp(0)
    for most in (_FEW, len(logits)):
        ordered, order = logits.topk(min(most, len(logits)))
        mass = (ordered - whole).exp()
        reached = mass.cumsum(0)
        if reached[-1] >= top_p:
            break
    # Keep a token if what is before it has not reached top_p > 0: the first always stays.
    kept = order[(reached - mass) < top_p]
    return torch.full_like(logits, -torch.inf).index_copy_(0, kept, logits[kept])


def sample(
    logits: Tensor,
    how: Sampling,
    previous: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> int:
    """One token id drawn from `probabilities`; the same generator state gives the same token."""
    if how.temperature == 0:
        return int(penalise(logits, how.repetition_penalty, previous).argmax())
    return int(torch.multinomial(probabilities(logits, how, previous), 1, generator=generator))
