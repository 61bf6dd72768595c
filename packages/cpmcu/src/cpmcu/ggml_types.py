"""ggml's tensor types as GGUF numbers them: what is needed to find a tensor in a file.

The same numbers as in the `gguf` package, which takes a tenth of a second to import and is asked
only for what is not here, and to expand tensors.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A type: `block` weights take `size` bytes."""

    name: str
    number: int
    block: int
    size: int


_SIZES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "F64": (28, 1, 8), "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66),
}  # fmt: skip
KINDS = {number: Kind(name, number, *rest) for name, (number, *rest) in _SIZES.items()}


def kind_of(number: int) -> Kind | None:
    """The type of that number; None: there is none."""
    if number in KINDS:
        return KINDS[number]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None
    return Kind(kind.name, number, *GGML_QUANT_SIZES[kind])
