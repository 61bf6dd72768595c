"""GPTQ (arXiv:2210.17323), and P-GPTQ of MiniCPM4 (arXiv:2506.07900, section 5.2).

The columns of a matrix are rounded one after the other; what rounding one adds to the layer's
output is taken back, as far as it goes, by the columns not yet rounded. What is minimised is the
squared error of the output on calibration inputs X [tokens, I]: tr((W - Q) H (W - Q)ᵀ) with
H = XᵀX.

P-GPTQ leaves the first positions of every sequence out of H. The first tokens serve attention as a
sink, and their activations are tens of times larger than all others: they would decide H alone, and
in use they are a few of many tokens. Leaving them out takes for granted that their keys and values
come from elsewhere (the paper stores them, `sinks` the first): if not, nothing guards the few
columns that only they use, and the sink breaks. So here they may also stay, scaled down to the size
of the others ("level"); "drop" is the paper's.

Letters: O rows, I columns, g columns of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpmcu._torch import torch
from cpmcu.codes import Codes, check, nearest_codes, scales_for

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = 4  # positions that P-GPTQ leaves out
_BLOCK = 128  # columns between two updates of all later columns


class Hessian:
    """H = Σ xᵀx over calibration inputs, in float64.

    Args:
        columns: I.
        skip: first positions of every sequence that are held back: 0 for GPTQ, 4 for P-GPTQ.
        level: scale them down to the mean size of the others, instead of leaving them out.
    """

    def __init__(self, columns: int, skip: int = 0, level: bool = False) -> None:
        self.matrix = torch.zeros(columns, columns, dtype=torch.float64)
        self.tokens, self.skip, self.level = 0, skip, level

    def add(self, x: Tensor) -> None:
        """Inputs of whole sequences, [sequences, positions, I]."""
        kept = x[:, self.skip :].flatten(0, 1).float()
        if self.level and self.skip:
            first = x[:, : self.skip].flatten(0, 1).float()
            size, others = first.norm(dim=1, keepdim=True), kept.norm(dim=1).mean()
            kept = torch.cat((kept, first * (others / size.clamp_min(1e-30)).clamp_max(1.0)))
        self.matrix += kept.T @ kept
        self.tokens += len(kept)


def objective(weight: Tensor, quantised: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's output on the calibration inputs: tr((W - Q) H (W - Q)ᵀ)."""
    lost = weight.double() - quantised.double()
    return float(((lost @ hessian) * lost).sum())


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with `damp` times its mean diagonal added, and 1 where an input was always zero.

    Without it H cannot be inverted when there were fewer tokens than columns.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal += damp * diagonal.mean()
    diagonal[dead] = 1.0
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with H⁻¹ = UᵀU: row i holds how columns after i make up for column i.

    Raises:
        ValueError: H is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed) or not bool(lower.isfinite().all()):
        raise ValueError(
            "the calibration inputs give no positive definite Hessian: raise --damp, or take more "
            "calibration text"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    search: bool = True,
) -> Codes:
    """Quantise a matrix.

    Args:
        weight: float [O, I].
        hessian: float64 [I, I], XᵀX of the matrix's inputs.
        bits: 4 or 8.
        group: columns to a scale; 32, 64 or 128.
        damp: part of H's mean diagonal that is added to it, > 0 unless H is well conditioned.
        act_order: round the columns of the largest inputs first. Scales then come from the weights
            as they were, so that groups stay neighbours.
        search: choose each scale by its squared error, weighted with H's diagonal; else by the
            largest weight.

    Returns:
        Codes; with `hessian` the identity those of `codes.nearest`.

    Raises:
        ValueError: sizes that do not fit, or a Hessian that is not positive definite.
    """
    O, I = weight.shape
    check(I, bits, group)
    if hessian.shape != (I, I):
        raise ValueError(f"hessian must be [{I}, {I}], got {tuple(hessian.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weights are not finite: the model is damaged, copy it again")
    hessian = damped(hessian.double(), damp)
    importance = hessian.diagonal().float()

    def scales_of(columns: Tensor, first: int) -> Tensor:
        """float16 [O] for one group."""
        weights = importance[first : first + group]
        return scales_for(columns, bits, search=search, importance=weights)

    w = weight.float().clone()
    scales = torch.empty(O, I // group, dtype=torch.float16)
    order = torch.arange(I)
    if act_order:
        for g in range(I // group):
            scales[:, g] = scales_of(w[:, g * group : (g + 1) * group], g * group)
        order = importance.argsort(descending=True, stable=True)
        w = w[:, order]
        hessian = hessian[order][:, order]
    u = inverse_factor(hessian).float()
    codes = torch.empty(O, I, dtype=torch.int8)
    for start in range(0, I, _BLOCK):
        stop = min(I, start + _BLOCK)
        errors = torch.empty(O, stop - start)
        for i in range(start, stop):
            g = int(order[i]) // group
            if not act_order and i % group == 0:
                # The later columns of a block do not know of its errors yet, but those of this
                # group must: groups begin with weights that are up to date.
                scales[:, g] = scales_of(w[:, i : i + group], i)
            column = w[:, i : i + 1]
            code = nearest_codes(column, scales[:, g], bits)
            codes[:, i] = code[:, 0]
            lost = (column - code * scales[:, g, None].float()) / u[i, i]
            w[:, i + 1 : stop] -= lost * u[i, i + 1 : stop]
            errors[:, i - start] = lost[:, 0]
        w[:, stop:] -= errors @ u[start:stop, stop:]
    if act_order:
        codes = codes[:, order.argsort()]
    return Codes(codes, scales, bits, weight.dtype)
