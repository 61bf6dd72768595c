"""What happens to the ternary weights during training: zeros, flips and the drift of the scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .qat import TernaryLinear, ternary_layers
from .reference import quantise


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One layer's ternary weights now, and against the last call.

    Attributes:
        zero_share: share of weights whose code is 0.
        mean_scale: mean of the groups' scales.
        flip_share: share of codes that changed since the last call; None at the first.
        scale_drift: mean over groups of |s - s'| / s' against the last call; None at the first.
    """

    zero_share: float
    mean_scale: float
    flip_share: float | None
    scale_drift: float | None


@torch.no_grad()
def quantisation_stats(model: nn.Module) -> dict[str, LayerStats]:
    """Statistics of every ternary layer, by module name.

    Between calls it keeps one byte per ternary weight on the layer (not in the state dict).

    Raises:
        ValueError: the model has no ternary layer, or a weight is NaN or infinite.
    """
    stats = {name: _layer_stats(module) for name, module in ternary_layers(model)}
    if not stats:
        raise ValueError("the model has no ternary layer: call ternarize(model) first")
    return stats


def _layer_stats(module: TernaryLinear) -> LayerStats:
    codes, scales = quantise(module.weight, module.ternary)
    scales = scales.float()
    last: tuple[Tensor, Tensor] | None = vars(module).get("_seen")
    flip_share = scale_drift = None
    if last is not None:
        old_codes, old_scales = (t.to(codes.device) for t in last)
        flip_share = (codes != old_codes).float().mean().item()
        scale_drift = ((scales - old_scales).abs() / old_scales).mean().item()
    module._seen = (codes, scales)
    return LayerStats(
        zero_share=(codes == 0).float().mean().item(),
        mean_scale=scales.mean().item(),
        flip_share=flip_share,
        scale_drift=scale_drift,
    )
