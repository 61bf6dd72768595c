"""What a fastText classifier computes, written down plainly: features, mean, softmax.

Bojanowski et al. (1607.04606), Joulin et al. (1607.01759); the details are the library's, read
from its behaviour: it hashes bytes as signed characters, carries word hashes as 32-bit signed
integers into 64-bit n-gram hashes, ends a document at a literal `</s>`, skips `__label__` words,
and adds 1e-5 to each probability. Nothing here is optimised; `scorer.py` is tested against it, and
both against the library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

END = b"</s>"
LABEL = b"__label__"
NGRAM_FACTOR = 116049371
SEPARATORS = re.compile(rb"[ \n\r\t\v\f\0]+")


def word_hash(word: bytes) -> int:
    """FNV-1a over signed bytes, as a 32-bit unsigned integer."""
    h = 2166136261
    for byte in word:
        signed = byte - 256 if byte > 127 else byte
        h = ((h ^ (signed & 0xFFFFFFFF)) * 16777619) & 0xFFFFFFFF
    return h


def tokens(text: str | bytes) -> list[bytes]:
    """The words the library reads from one document, the end mark included."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    found = [w for w in SEPARATORS.split(data) if w]
    if END in found:
        found = found[: found.index(END)]
    return [*(w for w in found if not w.startswith(LABEL)), END]


def features(text: str, vocabulary: Mapping[bytes, int], ngrams: int, bucket: int) -> list[int]:
    """Rows of the input matrix that a document averages.

    Args:
        text: normalised text.
        vocabulary: word -> row; rows from len(vocabulary) on are the n-grams'.
        ngrams: longest word n-gram.
        bucket: number of n-gram rows.

    A word outside the vocabulary has no row, but takes part in n-grams.
    """
    words = tokens(text)
    rows = [vocabulary[w] for w in words if w in vocabulary]
    # 32-bit signed, as the library stores them: the sign extends into the 64-bit arithmetic.
    hashes = [h - (1 << 32) if (h := word_hash(w)) >= 1 << 31 else h for w in words]
    for start in range(len(hashes)):
        h = hashes[start] % (1 << 64)
        for following in hashes[start + 1 : start + ngrams]:
            h = (h * NGRAM_FACTOR + following) % (1 << 64)
            rows.append(len(vocabulary) + h % bucket)
    return rows


def probability(rows: Sequence[int], inputs: np.ndarray, outputs: np.ndarray, label: int) -> float:
    """P(label), as the library reports it.

    Args:
        rows: from `features`.
        inputs: `[rows, dim]`; outputs: `[labels, dim]`.
        label: index into `outputs`.

    Returns:
        a probability in (0, 1]; 0.5 for a document without a single feature.
    """
    if not rows:
        return 0.5
    logits = outputs.astype(np.float64) @ inputs[np.array(rows)].astype(np.float64).mean(axis=0)
    share = math.exp(logits[label] - logits.max()) / np.exp(logits - logits.max()).sum()
    return min(1.0, float(share) + 1e-5)
