"""What can be chosen: the grid and group size of the quantiser, and the two-stage recipe."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

GridName = Literal["ternary", "asymmetric", "half-symmetric", "integer-symmetric", "five-level"]

# The five grids compared in BitCPM-CANN §3.1, as levels in units of the group's scale s.
GRIDS: dict[str, tuple[float, ...]] = {
    "ternary": (-1.0, 0.0, 1.0),
    "asymmetric": (-2.0, -1.0, 0.0, 1.0),
    "half-symmetric": (-1.5, -0.5, 0.5, 1.5),
    "integer-symmetric": (-2.0, -1.0, 1.0, 2.0),
    "five-level": (-2.0, -1.0, 0.0, 1.0, 2.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TernaryConfig:
    """How a weight matrix [out, in] is quantised: BitCPM-CANN §3.2, MiniCPM4 report §3.3.

    Args:
        group_size: input channels that share one scale, >= 1, or -1 for a whole row. A row whose
            length is not a multiple ends in a shorter group. The paper trains with 32, 64, 128 and
            whole rows; 128 is what the released BitCPM4 weights are reported to use.
        grid: one of `GRIDS`. Only "ternary" can be packed.
        eps: smallest scale, > 0, so that a group of zeros divides by something.
        skip: modules kept in full precision. An entry matches where its dotted parts appear
            together in a module's name: "mlp" and "layers.0" both match "model.layers.0.mlp.fc".
            The output head and tied weights are kept whatever this says (`qat.ternarize`).
    """

    group_size: int = 128
    grid: GridName = "ternary"
    eps: float = 1e-5
    skip: tuple[str, ...] = ("embed_tokens", "lm_head")

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}; got {self.grid!r}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps must be a finite number > 0, got {self.eps!r}")
        if isinstance(self.skip, str) or not all(isinstance(s, str) and s for s in self.skip):
            raise ValueError(f"skip must be a tuple of module names, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))

    def skips(self, name: str) -> bool:
        """Whether the module (or parameter) of this dotted name is kept in full precision."""
        return any(f".{entry}." in f".{name}." for entry in self.skip)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `TernaryConfig(**d)` restores the configuration."""
        return {**asdict(self), "skip": list(self.skip)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoStageConfig:
    """Full-precision training, then QAT: MiniCPM4 report §3.3.

    The defaults are the report's "wind tunnel" (5M parameters, 2B tokens). Steps are optimiser
    steps. `bitcpm.two_stage` has the schedule itself.

    Args:
        qat_fraction: share of all steps trained with ternary weights, in (0, 1]. The report finds
            that 0.4, twice `decay_fraction`, reaches the loss of QAT from scratch; 1.0 is that.
        lr: peak learning rate of the first stage (in the report's muP units), > 0.
        qat_lr_ratio: peak of the second stage over `lr`, > 0. The report: 5e-3 over 1e-2.
        warmup_steps: linear warm-up from nothing at the start, >= 0.
        rewarmup_steps: linear warm-up from nothing at the switch to QAT, >= 0. The report calls it
            critical; 0 is there for ablations.
        decay_fraction: last share of all steps, in which the rate decays, in (0, 1).
        final_lr_ratio: rate after the last step over the peak of its stage, in (0, 1]. The decay
            is exponential, as in MiniCPM's WSD; the report gives neither shape nor end.
        allow_short_qat: accept qat_fraction < 2 * decay_fraction, for ablations.
    """

    qat_fraction: float = 0.4
    lr: float = 1e-2
    qat_lr_ratio: float = 0.5
    warmup_steps: int = 100
    rewarmup_steps: int = 100
    decay_fraction: float = 0.2
    final_lr_ratio: float = 0.1
    allow_short_qat: bool = False

    def __post_init__(self) -> None:
        for field, low_open, high in (
            ("qat_fraction", 0.0, 1.0),
            ("decay_fraction", 0.0, 1.0),
            ("final_lr_ratio", 0.0, 1.0),
            ("lr", 0.0, math.inf),
            ("qat_lr_ratio", 0.0, math.inf),
        ):
            value = getattr(self, field)
            if not (low_open < value <= high and math.isfinite(value)):
                raise ValueError(f"{field} must be > {low_open:g} and <= {high:g}, got {value!r}")
        if self.decay_fraction == 1.0:
            raise ValueError(
                "decay_fraction must be < 1: the rate cannot decay from the first step"
            )
        for field in ("warmup_steps", "rewarmup_steps"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{field} must be a whole number >= 0, got {value!r}")
        # 0.4 < 2 * 0.2 must not fail for want of the last bit.
        if self.qat_fraction < 2 * self.decay_fraction - 1e-9 and not self.allow_short_qat:
            raise ValueError(
                f"qat_fraction {self.qat_fraction:g} is less than twice decay_fraction "
                f"{self.decay_fraction:g}, below which the report finds a worse loss: raise "
                "qat_fraction, lower decay_fraction, or set allow_short_qat=True"
            )


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless `group_size` is a whole number >= 1, or -1."""
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise ValueError(f"group_size must be a whole number, got {group_size!r}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size must be >= 1, or -1 for a whole row; got {group_size}")


def groups_of(in_features: int, group_size: int) -> tuple[int, int, int]:
    """Split a row: (size of a full group, number of full groups, size of the tail or 0).

    `group_size` -1, or more than the row, makes one group of the row.
    """
    size = in_features if group_size == -1 else min(group_size, in_features)
    return size, in_features // size, in_features % size
