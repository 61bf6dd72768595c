"""What decides a row besides its text: scores, and the rules that hold whatever the score."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from ultraclean.classifier import Classifier
from ultraclean.jsonl_format import Rows
from ultraclean.minhash import Decontaminator


class Judged(NamedTuple):
    """A block with what can be known of each row alone; None and 0 where a row has no text."""

    rows: Rows
    scores: list[float | None]
    tokens: list[int]
    keys: list[bytes]
    contaminated: list[bool]


class Heuristics:
    """What is rejected whatever its score: texts that are too short, or came before.

    Args:
        min_chars: shorter texts are `short`; 0 turns it off.
        drop_duplicates: texts equal to an earlier one, to the character, are `duplicate`; costs
            some 120 bytes of memory for each different text.
        evaluations: texts that share n-grams with these are `contaminated`.
    """

    def __init__(
        self,
        min_chars: int = 0,
        drop_duplicates: bool = False,
        evaluations: Decontaminator | None = None,
    ) -> None:
        self.min_chars, self.drop_duplicates = min_chars, drop_duplicates
        self.evaluations = evaluations
        self._seen: set[bytes] = set()

    def key(self, text: str) -> bytes:
        """What is remembered of a text."""
        if not self.drop_duplicates:
            return b""
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def is_duplicate(self, key: bytes) -> bool:
        """Whether the text came before; from now on it has."""
        if not self.drop_duplicates:
            return False
        known = len(self._seen)
        self._seen.add(key)
        return len(self._seen) == known

    def reasons(self, judged: Judged, threshold: float) -> list[str]:
        """Why each row is rejected: "" for those that are kept."""
        found = []
        for i, problem in enumerate(judged.rows.problems):
            if problem:
                found.append("")
            elif self.is_duplicate(judged.keys[i]):
                found.append("duplicate")
            elif len(judged.rows.texts[i]) < self.min_chars:
                found.append("short")
            elif judged.contaminated[i]:
                found.append("contaminated")
            else:
                found.append("" if judged.scores[i] >= threshold else "score")
        return found


def judge(rows: Rows, classifier: Classifier, rules: Heuristics) -> Judged:
    """Score a block. Scores are rounded as they are written: a reader finds the same decision."""
    usable = [text for text, problem in zip(rows.texts, rows.problems, strict=True) if not problem]
    shares, tokens = classifier.scorer.score_raw(usable, classifier.normaliser)
    found = iter(zip([round(s, 6) for s in shares.tolist()], tokens.tolist(), strict=True))
    scores: list[float | None] = []
    counts: list[int] = []
    keys: list[bytes] = []
    for text, problem in zip(rows.texts, rows.problems, strict=True):
        score, count = (None, 0) if problem else next(found)
        scores.append(score)
        counts.append(count)
        keys.append(b"" if problem else rules.key(text))
    found_in = rules.evaluations.contaminated(rows.texts) if rules.evaluations else []
    return Judged(rows, scores, counts, keys, found_in or [False] * len(scores))
