"""Quantisation-aware training with ternary weights: BitCPM-CANN §3.2, MiniCPM4 report §3.3.

Forward with Wq, backward as if with W (straight-through), activations untouched. The papers write
the estimator as W + stopgrad(Wq - W); in bf16 that sum rounds to something that is not Wq, so here
an autograd function returns Wq itself and hands the gradient on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TernaryConfig
from .recover import looks_ternary
from .reference import check_matrix, level_of, scale_of, split_groups

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def fake_quantise(w: Tensor, config: TernaryConfig) -> Tensor:
    """Wq in the shape and dtype of `w` [O, I]: `reference.dequantise(*quantise(w))`, bit for bit.

    No gradient flows; NaN and infinity are kept, so that a diverged run shows.
    """
    quantised = []
    for w_Ong in split_groups(w, config.group_size):
        s_On1 = scale_of(w_Ong, config)
        if config.grid == "ternary":
            # In place and in the weights' dtype. That is exact: the quotient crosses 1/2 only where
            # the weight crosses s/2, whatever the precision it is rounded to. Adding zero turns
            # -0.0 into 0.0, so that a group has three values, not four.
            q_Ong = (w_Ong / s_On1).round_().clamp_(-1, 1).mul_(s_On1).add_(0.0)
        else:
            s = s_On1.float()
            q_Ong = (level_of(w_Ong.float() / s, config.grid) * s + 0.0).to(w.dtype)
        quantised.append(q_Ong.flatten(1))
    return quantised[0] if len(quantised) == 1 else torch.cat(quantised, 1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, config: TernaryConfig) -> Tensor:
        return fake_quantise(w, config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass  # The gradient needs nothing saved.

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(w: Tensor, config: TernaryConfig | None = None) -> Tensor:
    """Wq of `w` [O, I], exactly, with the identity as its gradient."""
    config = config or TernaryConfig()
    check_matrix(w)
    return _StraightThrough.apply(w, config)


class TernaryLinear(nn.Linear):
    """A linear layer that multiplies by the quantised weight and trains the latent one.

    `weight` (and so the state dict) is the latent weight of an `nn.Linear`: a checkpoint loads into
    a plain model and the other way round. The bias is not quantised.
    """

    ternary: TernaryConfig

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: TernaryConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.ternary = config or TernaryConfig()

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., I] times Wq transposed, plus the bias: [..., O]."""
        return F.linear(input, _StraightThrough.apply(self.weight, self.ternary), self.bias)

    def extra_repr(self) -> str:
        """The sizes, the group size and the grid."""
        return f"{super().extra_repr()}, group_size={self.ternary.group_size}, {self.ternary.grid}"


def ternary_layers(model: nn.Module) -> Iterator[tuple[str, TernaryLinear]]:
    """The names and modules that `ternarize` changed."""
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            yield name, module


def ternarize(model: Model, config: TernaryConfig | None = None) -> Model:
    """Make the decoder's linear layers ternary, in place; `unternarize` undoes it.

    Every `nn.Linear` changes, except the output head (`model.get_output_embeddings()`), layers
    whose weight is also an embedding's, and `config.skip`. Parameters stay the same objects under
    the same names, so that optimisers and hooks go on working.

    Args:
        model: any module; a transformers decoder as a rule.
        config: defaults to TernaryConfig().

    Returns:
        `model`.

    Raises:
        ValueError: nothing to change; a layer is ternary already, by type or by its weights
            (absmean would shrink their scales: load the latent weights instead); or another library
            replaced a layer's forward. Nothing is changed then.
    """
    config = config or TernaryConfig()
    chosen = list(eligible(model, config))
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to make ternary besides its head and "
            f"skip={config.skip}"
        )
    for name, module in chosen:
        if isinstance(module, TernaryLinear):
            raise ValueError(f"{name} is ternary already: call unternarize(model) first")
        if "forward" in vars(module):
            raise ValueError(
                f"{name}.forward was replaced on the module itself (accelerate does so for "
                "device_map): call ternarize before that"
            )
        check_matrix(module.weight)
        if not module.weight.is_meta and looks_ternary(module.weight.detach()):
            raise ValueError(
                f"{name}.weight is pseudo-quantised already, and absmean would shrink its scales: "
                "load the latent checkpoint, or keep the layer as it is with skip"
            )
    for _, module in chosen:
        # Changing the class, as FSDP does, keeps the module's identity, parameters and hooks.
        module.__class__ = TernaryLinear
        module.ternary = config
    count = sum(module.weight.numel() for _, module in chosen)
    total = sum(p.numel() for p in model.parameters())
    log.info("ternarized %d layers: %d of %d parameters", len(chosen), count, total)
    return model


def unternarize(model: Model) -> Model:
    """Undo `ternarize` in place: plain linear layers again, with the latent weights."""
    for _, module in list(ternary_layers(model)):
        module.__class__ = nn.Linear
        for attribute in ("ternary", "_seen"):
            vars(module).pop(attribute, None)
    return model


@torch.no_grad()
def materialise(model: Model) -> Model:
    """Finish QAT in place: plain linear layers whose weights are Wq (pseudo-quantised).

    The latent weights are gone: save them first if training may go on. The result loads anywhere as
    a normal model, and `bitcpm pack` makes it small. Converting it to bf16 or fp16 keeps it
    ternary.
    """
    for _, module in ternary_layers(model):
        module.weight.copy_(fake_quantise(module.weight, module.ternary))
    return unternarize(model)


def eligible(model: nn.Module, config: TernaryConfig) -> Iterator[tuple[str, nn.Linear]]:
    """The names and modules of the linear layers that `config` makes ternary.

    Raises:
        ValueError: one is of a class whose forward bitcpm does not know.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head or config.skips(name):
            continue
        if type(module) not in (nn.Linear, TernaryLinear):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose forward bitcpm does not know: name it "
                "in skip, or replace it by nn.Linear"
            )
        if id(module.weight) not in tied:
            yield name, module
