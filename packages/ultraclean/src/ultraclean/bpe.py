"""A `tokenizer.json` as tables for the native BPE, and its tokens as features of a classifier.

After Ultra-FineWeb's normaliser, a document is a list of tokens, each decoded alone. What a token
adds to a score is then known beforehand: its words, their hashes, their scalars. So text never
becomes words again: scoring looks tokens up.
"""

from __future__ import annotations

import ctypes
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ultraclean import native, native_args
from ultraclean.hashing import word_hashes
from ultraclean.reference import END, LABEL, SEPARATORS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_CLASS = re.compile(r"(\\s\?)?(\[[^\]]+\])(\+)?", re.S)
_SPACE_BIT = 1
_FIRST_BIT = 1  # of the classes; the highest bit is the native code's own
_MOST_CLASSES = 6
_POINTS = 0x110000
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


class Unsupported(ValueError):
    """This tokenizer is left to the library `tokenizers`."""


class Tables:
    """The tables of one tokenizer that do not depend on a classifier.

    Args:
        description: the parsed tokenizer.json.

    Raises:
        Unsupported: it is no byte-level BPE whose pre-tokenizer only splits by classes of
            characters, as DeepSeek-V2's does.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        model = description["model"]
        if model.get("type", "BPE") != "BPE" or any(
            model.get(key)
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                        "byte_fallback", "ignore_merges")
        ):  # fmt: skip
            raise Unsupported("its model is not a plain BPE")
        normaliser = description.get("normalizer")
        if normaliser is not None and normaliser != {"type": "Sequence", "normalizers": []}:
            raise Unsupported("it has a normaliser of its own")
        self._split(description.get("pre_tokenizer") or {})
        self._merges(model)
        added = description.get("added_tokens", [])
        if any(not t["content"] or "\0" in t["content"] for t in added):
            raise Unsupported("an added token without text")
        self.added = [t["content"] for t in added]
        self._added = np.frombuffer(b"".join(t.encode() + b"\0" for t in self.added) + b"\0", "u1")

    def _split(self, pre: dict[str, Any]) -> None:
        """The pre-tokenizer's steps, and which classes each code point is in."""
        steps = pre.get("pretokenizers", [pre])
        last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        if not steps or any(steps[-1].get(k) != v for k, v in last.items()):
            raise Unsupported("its pre-tokenizer does not end in plain bytes")
        bits = np.zeros(_POINTS, np.uint8)
        bits[[ord(c) for c in _WHITE]] |= _SPACE_BIT
        splits, used = [], _FIRST_BIT
        points = [p for p in range(_POINTS) if not 0xD800 <= p < 0xE000]
        everything = "".join(map(chr, points))
        for step in steps[:-1]:
            if step == {"type": "Digits", "individual_digits": True}:
                inside = [p for p in points if unicodedata.category(chr(p)) in ("Nd", "Nl", "No")]
                space, many = False, False
            else:
                pattern = step.get("pattern", {}).get("Regex", "")
                if (step.get("type"), step.get("behavior"), step.get("invert")) != (
                    "Split", "Isolated", False,
                ):  # fmt: skip
                    raise Unsupported("its pre-tokenizer does more than split")
                if pattern == r"\s+$":
                    splits.append(native_args.Split(_SPACE_BIT, 0, 1, 1))
                    continue
                found = _CLASS.fullmatch(pattern)
                if found is None or "\\" in found[2] or "&&" in found[2] or "[" in found[2][1:]:
                    raise Unsupported(f"its pre-tokenizer splits by {pattern[:60]!r}")
                inside = [ord(c) for c in re.findall(found[2], everything)]
                space, many = bool(found[1]), bool(found[3])
            if used == 1 << _MOST_CLASSES:
                raise Unsupported("its pre-tokenizer has too many steps")
            used <<= 1
            bits[inside] |= used
            splits.append(native_args.Split(used, int(space), int(many), 0))
        rows, place = np.unique(bits.reshape(-1, 256), axis=0, return_inverse=True)
        self._pages, self._rows = place.astype(np.uint16).ravel(), np.ascontiguousarray(rows)
        self._splits = (native_args.Split * max(1, len(splits)))(*splits)
        self._split_count = len(splits)

    def _merges(self, model: dict[str, Any]) -> None:
        vocabulary = model["vocab"]
        # UTF-8 never has the bytes from 0xf5 on, nor 0xc0 and 0xc1; a byte without a token that it
        # may have would be dropped by the library, which is not worth imitating.
        ids = [vocabulary.get(c, -1) for c in _characters_of_bytes()]
        if any(i < 0 for b, i in enumerate(ids) if b < 0xF5 and b not in (0xC0, 0xC1)):
            raise Unsupported("not every byte is a token")
        self._bytes = np.array(ids, np.int32)
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        left = np.array([vocabulary[a] for a, _ in pairs], np.uint64)
        right = np.array([vocabulary[b] for _, b in pairs], np.uint64)
        token = np.array([vocabulary[a + b] for a, b in pairs], np.uint64)
        keys = left << np.uint64(32) | right
        values = np.arange(len(pairs), dtype=np.uint64) << np.uint64(32) | token
        self._pairs = _open_addressing(keys, values)

    def args(self, tokens: np.ndarray, several: np.ndarray) -> native_args.BpeArgs:
        """For the native code, with a classifier's features of each token."""
        return native.keep(
            native_args.BpeArgs(
                self._pages.ctypes.data, self._rows.ctypes.data,
                ctypes.addressof(self._splits), self._split_count,
                self._bytes.ctypes.data, self._pairs.ctypes.data, len(self._pairs),
                tokens.ctypes.data, several.ctypes.data,
                self._added.ctypes.data, len(self.added),
            ),
            self, tokens, several,
        )  # fmt: skip


def _characters_of_bytes() -> list[str]:
    """How byte-level BPE writes each byte: printable ones as they are, the others from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _open_addressing(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """uint64 `[slots, 2]`: each key where probing from its hash first finds room."""
    size = 1 << max(4, (2 * len(keys)).bit_length())
    table = np.full((size, 2), _EMPTY, np.uint64)
    at = ((keys * _MULTIPLIER) >> np.uint64(32)) & np.uint64(size - 1)
    left = np.arange(len(keys))
    while len(left):
        free = left[table[at[left], 1] == _EMPTY]
        _, first = np.unique(at[free], return_index=True)
        placed = free[first]
        table[at[placed], 0], table[at[placed], 1] = keys[placed], values[placed]
        left = np.setdiff1d(left, placed, assume_unique=True)
        at[left] = (at[left] + np.uint64(1)) & np.uint64(size - 1)
    return table


def features_of_tokens(
    tokenizer: Tokenizer, words: Sequence[bytes], table: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each token adds to a score: (`native_args.TOKEN` `[tokens]`, the same of several words).

    Args:
        tokenizer: decodes a token.
        words: the classifier's vocabulary in row order.
        table: its scalars, fp32 `[len(words) + bucket]`.
    """
    from ultraclean.normalise import spell_out

    size = tokenizer.get_vocab_size(with_added_tokens=True)
    pieces = tokenizer.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    split = [_words(spell_out(piece)) for piece in pieces]
    wanted = {word for found in split for word in found}
    rows = {word: row for row, word in enumerate(words) if word in wanted}
    distinct = list(wanted)
    hashes = dict(zip(distinct, word_hashes(distinct).astype(np.uint32).view(np.int32).tolist(),
                      strict=True))  # fmt: skip

    def feature(word: bytes) -> tuple[int, float, int, int]:
        row = rows.get(word)
        if word == END:
            return 0, 0.0, native_args.END_MARK, 1
        if row is None or np.isnan(table[row]):
            return hashes[word], 0.0, native_args.STRANGE, 1
        return hashes[word], float(table[row]), native_args.ROW, 1

    tokens = np.zeros(size, native_args.TOKEN)
    several: list[tuple[int, float, int, int]] = []
    for i, (piece, found) in enumerate(zip(pieces, split, strict=True)):
        # At an end of a document Python strips more than fastText's separators.
        edge = (
            native_args.EDGE
            if any(c.isspace() and (c > " " or c > "\x1b" and c < " ") for c in piece)
            else 0
        )
        if len(found) == 1:
            h, scalar, kind, count = feature(found[0])
            tokens[i] = (h, scalar, kind | edge, count)
        elif found:
            tokens[i] = (len(several), 0.0, native_args.SEVERAL | edge, len(found))
            several += map(feature, found)
        elif edge:
            tokens[i] = (len(several), 0.0, native_args.SEVERAL | edge, 0)
    return tokens, np.array([*several, (0, 0.0, 0, 0)], native_args.TOKEN)


def _words(text: str) -> list[bytes]:
    found = [w for w in SEPARATORS.split(text.encode("utf-8", "replace")) if w]
    return [w for w in found if not w.startswith(LABEL)]


def tables_of(data: bytes) -> tuple[Tables | None, str]:
    """The tables, or None and why the native code leaves this tokenizer to the library."""
    try:
        return Tables(json.loads(data)), ""
    except Unsupported as error:
        return None, str(error)
    except (KeyError, TypeError, ValueError) as error:
        return None, f"its description is not understood ({error})"
