"""What became of every line of a filtered corpus, in numbers and a few examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

# A source column may hold something different on each line, such as an address.
MOST_SOURCES = 1000
OTHER_SOURCES = "(other sources)"
EXAMPLES = 3

Example = dict[str, Any]


@dataclass
class FilterReport:
    """What became of every line: total = kept + rejected + malformed."""

    total: int = 0
    """Lines with anything on them."""
    kept: int = 0
    rejected: int = 0
    malformed: int = 0
    blank: int = 0
    """Lines without anything but white space, as at the end of many files; not in `total`."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason -> rejected lines: `score`, `short`, `duplicate`."""
    malformed_reasons: dict[str, int] = field(default_factory=dict)
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source -> {"kept": n, "rejected": n}; past a thousand sources, the rest together."""
    reasons_by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source -> reason -> rejected lines."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """`kept, surest`, `kept, barely`, `dropped, barely`, `dropped, surest` -> up to three texts
    each, where a reader learns most; of those dropped, only what the score decided."""

    def count_malformed(self, reason: str) -> None:
        """One more line that holds no usable text."""
        self.total += 1
        self.malformed += 1
        self.malformed_reasons[reason] = self.malformed_reasons.get(reason, 0) + 1

    def count_block(
        self,
        sources: list[str],
        reasons: list[str],
        scores: list[float],
        example: Callable[[int], Example],
    ) -> None:
        """Many lines that were kept, or rejected for a reason.

        Args:
            sources: where each is from.
            reasons: why each was rejected; "" if it was kept.
            scores: of each.
            example: what to show of the line of that index, `score` included.
        """
        for (source, reason), lines in Counter(zip(sources, reasons, strict=True)).items():
            self._count(source, reason, lines)
        for side, shown in (("kept", ""), ("dropped", "score")):
            found = [i for i, reason in enumerate(reasons) if reason == shown]
            upward = -1 if shown else 1
            for name, sign in (("surest", upward), ("barely", -upward)):
                # Of equals the first seen: the sort is stable, also downward.
                best = sorted(found, key=scores.__getitem__, reverse=sign > 0)[:EXAMPLES]
                for i in best:
                    self._show(f"{side}, {name}", sign * scores[i], i, example, sign)

    def _count(self, source: str, reason: str, lines: int) -> None:
        if source not in self.by_source and len(self.by_source) >= MOST_SOURCES:
            source = OTHER_SOURCES
        self.total += lines
        counts = self.by_source.setdefault(source, {"kept": 0, "rejected": 0})
        if reason:
            self.rejected += lines
            counts["rejected"] += lines
            self.reasons[reason] = self.reasons.get(reason, 0) + lines
            reasons = self.reasons_by_source.setdefault(source, {})
            reasons[reason] = reasons.get(reason, 0) + lines
        else:
            self.kept += lines
            counts["kept"] += lines

    def _show(
        self, name: str, rank: float, i: int, example: Callable[[int], Example], sign: int
    ) -> None:
        """Keep the `EXAMPLES` with the highest rank, sign · score; of equals the first seen."""
        shown = self.examples.setdefault(name, [])
        if len(shown) == EXAMPLES and rank <= sign * shown[-1]["score"]:
            return
        at = sum(sign * other["score"] >= rank for other in shown)
        shown.insert(at, example(i))
        del shown[EXAMPLES:]

    def ordered(self) -> FilterReport:
        """The same with names in alphabetical order, not in that of the input."""
        for name in ("reasons", "malformed_reasons", "by_source", "reasons_by_source"):
            setattr(self, name, dict(sorted(getattr(self, name).items())))
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)
