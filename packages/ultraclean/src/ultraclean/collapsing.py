"""From a fastText model to the table of scalars: one number for each row of its input matrix."""

from __future__ import annotations

import numpy as np

from ultraclean.model_file import LOSSES, SUPERVISED, ModelFile

# Rows at a time: the sum wants fp64, the matrix may be gigabytes.
_ROWS = 1 << 14


def collapse(inputs: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """s_r = E_r·(w_pos − w_neg): fp32 `[rows]` from `[rows, dim]` and two vectors `[dim]`."""
    return inputs.astype(np.float64) @ (positive.astype(np.float64) - negative.astype(np.float64))


def table_of(model: ModelFile, positive: str, negative: str) -> np.ndarray:
    """fp32 `[words + bucket]`: all that a two-label classifier needs.

    A pruned model's missing rows are NaN, and so are all n-grams of one without a bucket left.

    Raises:
        ValueError: another loss or number of labels, no such label, or character n-grams.
    """
    settings = model.settings
    if settings["model"] != SUPERVISED:
        raise ValueError("this fastText model holds word vectors: a classifier is needed")
    if LOSSES.get(settings["loss"]) != "softmax":
        raise ValueError(
            f"a classifier with the loss {LOSSES.get(settings['loss'])!r} is not linear in the way "
            "that scoring needs: train one with softmax"
        )
    if len(model.labels) != 2:
        raise ValueError(f"expected two labels, got {len(model.labels)}: {model.labels[:5]}")
    for label in (positive, negative):
        if label not in model.labels:
            raise ValueError(f"no label {label!r}: the model has {', '.join(model.labels)}")
    if settings["maxn"] > 0:
        raise ValueError(
            f"the model has character n-grams (maxn {settings['maxn']}): only word n-grams are read"
        )
    good, bad = (model.outputs[model.labels.index(label)] for label in (positive, negative))
    rows = model.inputs.shape[0]
    scalars = np.empty(rows, np.float32)
    for begin in range(0, rows, _ROWS):
        part = model.inputs.rows(begin, min(begin + _ROWS, rows))
        scalars[begin : begin + len(part)] = collapse(part, good, bad)
    if model.pruned is None:
        return scalars
    words = len(model.words)
    table = np.full(words + settings["bucket"], np.nan, np.float32)
    table[:words] = scalars[:words]
    for bucket, row in model.pruned.items():
        table[words + bucket] = scalars[words + row]
    return table
