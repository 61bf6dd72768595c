"""The structures of `csrc/args.h`, field for field."""

from __future__ import annotations

from ctypes import Structure, c_double, c_int32, c_int64, c_uint8, c_void_p

import numpy as np

SLOT = np.dtype([("hash", "u4"), ("row", "i4"), ("begin", "u4"), ("length", "u4")])
TOKEN = np.dtype([("hash", "i4"), ("scalar", "f4"), ("kind", "u2"), ("words", "u2")])
TYPE = np.dtype([("begin", "i8"), ("count", "i8"), ("hash", "u4"), ("length", "i4")])
FEATURE = np.dtype([("hash", "u4"), ("row", "i4")])
NONE, ROW, STRANGE, SEVERAL, END_MARK, EDGE = 0, 1, 2, 3, 4, 8
"""Kinds of a token, `TokenKind` in csrc/bpe.hpp."""


class ModelArgs(Structure):
    """ultraclean_model."""

    _fields_ = [
        *((name, c_void_p) for name in ("table", "slots", "words")),
        *((name, c_int64) for name in ("slot_count", "vocabulary", "bucket")),
        ("ngrams", c_int32),
        ("pruned", c_int32),
    ]


class FoldArgs(Structure):
    """ultraclean_fold."""

    _fields_ = [
        *((name, c_void_p) for name in ("pages", "entries", "text")),
        ("newlines", c_int32),
        ("trim", c_int32),
    ]


class BpeArgs(Structure):
    """ultraclean_bpe."""

    _fields_ = [
        *((name, c_void_p) for name in ("pages", "classes", "splits")),
        ("split_count", c_int64),
        ("bytes", c_void_p),
        ("pairs", c_void_p),
        ("pair_slots", c_int64),
        *((name, c_void_p) for name in ("tokens", "several", "added")),
        ("added_count", c_int64),
    ]


class IndexArgs(Structure):
    """ultraclean_index_args."""

    _fields_ = [
        ("words", c_void_p),
        ("offsets", c_void_p),
        ("count", c_int64),
        ("slots", c_void_p),
        ("slot_count", c_int64),
    ]


class ScoreArgs(Structure):
    """ultraclean_score_args."""

    _fields_ = [
        ("model", ModelArgs),
        ("text", c_void_p),
        ("offsets", c_void_p),
        ("documents", c_int64),
        *((name, c_void_p) for name in ("ids", "fold", "bpe", "logits", "counted", "work")),
        ("work_stride", c_int64),
        ("expansion", c_int64),
    ]


class ExactArgs(Structure):
    """ultraclean_exact_args."""

    _fields_ = [
        ("model", ModelArgs),
        ("text", c_void_p),
        ("offsets", c_void_p),
        ("documents", c_int64),
        ("input", c_void_p),
        ("output", c_void_p),
        ("dim", c_int64),
        ("labels", c_int64),
        ("hidden", c_void_p),
        ("work", c_void_p),
        ("work_stride", c_int64),
    ]


class MinhashArgs(Structure):
    """ultraclean_minhash_args."""

    _fields_ = [
        ("text", c_void_p),
        ("offsets", c_void_p),
        *((name, c_int64) for name in ("documents", "ngrams", "hashes")),
        *((name, c_void_p) for name in ("fold", "a", "b", "signatures", "content")),
        *((name, c_void_p) for name in ("grams", "gram_count", "work")),
        ("work_stride", c_int64),
        ("expansion", c_int64),
    ]


class Split(Structure):
    """ultraclean_split: one step of a pre-tokenizer."""

    _fields_ = [(name, c_uint8) for name in ("mask", "space_before", "many", "at_end")]


class WordsArgs(Structure):
    """ultraclean_words_args."""

    _fields_ = [
        *((name, c_void_p) for name in ("text", "offsets")),
        ("documents", c_int64),
        *((name, c_void_p) for name in ("fold", "folded", "out", "sizes")),
    ]


class CountArgs(Structure):
    """ultraclean_count_args."""

    _fields_ = [
        *((name, c_void_p) for name in ("text", "offsets")),
        ("documents", c_int64),
        ("slots", c_void_p),
        ("slot_count", c_int64),
        ("types", c_void_p),
        ("type_room", c_int64),
        *((name, c_void_p) for name in ("tokens", "lengths", "state")),
        ("rebuild", c_int32),
    ]


class MergeArgs(Structure):
    """ultraclean_merge_args."""

    _fields_ = [
        ("into", CountArgs),
        ("types", c_void_p),
        ("count", c_int64),
        ("becomes", c_void_p),
    ]


class ProgressArgs(Structure):
    """ultraclean_progress."""

    _fields_ = [
        ("output", c_double),
        *((name, c_int64) for name in ("document", "tokens", "diverged")),
    ]


class TrainArgs(Structure):
    """ultraclean_train_args."""

    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "starts", "good", "features", "table")),
        *((name, c_int64) for name in ("vocabulary", "bucket")),
        ("lr", c_double),
        *((name, c_int64) for name in ("total", "until")),
        *((name, c_void_p) for name in ("progress", "rows")),
        ("ngrams", c_int32),
    ]
