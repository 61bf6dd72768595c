"""Linear layers that compute on packed ternary weights, for inference on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .config import TernaryConfig
from .matrix import Mode, TernaryMatrix
from .packing import PackedTensor
from .qat import eligible
from .recover import looks_ternary

Model = TypeVar("Model", bound=nn.Module)
LAYOUT = "layout"


class PackedTernaryLinear(nn.Module):
    """An `nn.Linear` whose weight stays packed: 1.6 or 2 bits and the groups' scales.

    The state dict has `layout` (uint8, the kernels' order, see `csrc/args.h`) and `bias`.

    Args:
        packed: the weight [O, I].
        bias: [O] or None.
        mode: "int8" (activations by token), "int8-group", or "exact" (float32 activations).
        codec: of the kernel layout; None keeps that of `packed`.

    Raises:
        ImportError: the CPU kernels were not built.
    """

    layout: Tensor

    def __init__(
        self,
        packed: PackedTensor,
        bias: Tensor | None = None,
        mode: Mode = "int8",
        codec: str | None = None,
    ) -> None:
        super().__init__()
        self._matrix = TernaryMatrix.from_packed(packed, codec)
        self.out_features, self.in_features = packed.shape
        self.mode = mode
        self.register_buffer(LAYOUT, self._matrix.data)
        bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> TernaryMatrix:
        """The weight, over the memory that the buffer has now (a copied or loaded module's own)."""
        m = self._matrix
        if m.data.data_ptr() != self.layout.data_ptr():
            m = TernaryMatrix(self.layout, m.shape, m.group_size, m.codec, m.scale_dtype)
            self._matrix = m
            self.layout = m.data
        return m

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., I] times the weight transposed, plus the bias: [..., O].

        Raises:
            ValueError: a gradient is asked for; the input has another size, or is not on the CPU.
        """
        if input.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "packed ternary layers have no gradient: run under torch.no_grad(), or train with "
                "bitcpm.ternarize"
            )
        return self.matrix.multiply(input, self.bias, self.mode)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain layer with the same weight and bias, in the dtype of the scales or `dtype`."""
        weight = self.matrix.to_packed().dequantise(dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        """The sizes, group size, codec and mode."""
        m = self._matrix
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={m.group_size}, {m.codec}, {self.mode}"
        )


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedTernaryLinear]]:
    """The names and modules of a model's packed layers."""
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            yield name, module


def pack_layers(
    model: Model,
    config: TernaryConfig | None = None,
    codec: str = "1.6bit",
    mode: Mode = "int8",
) -> Model:
    """Replace a pseudo-quantised decoder's linear layers by packed ones, in place.

    `unpack_layers` undoes it, bit for bit. The layers are those that `ternarize` would change.

    Args:
        model: its linear weights are ternary (`materialise` makes them so).
        config: its group size and `skip` are used; defaults to TernaryConfig().
        codec: "1.6bit" (smallest, fastest where weights do not fit the cache) or "2bit".
        mode: see `PackedTernaryLinear`.

    Raises:
        ImportError: the CPU kernels were not built.
        ValueError: no layer is ternary; one is not ternary in these groups. Nothing is changed
            then.
    """
    config = config or TernaryConfig()
    packed = {
        name: PackedTensor.from_weights(m.weight.detach(), config.group_size, codec, name)
        for name, m in eligible(model, config)
        if looks_ternary(m.weight.detach())
    }
    if not packed:
        raise ValueError(
            f"{type(model).__name__} has no ternary linear layer: finish QAT with "
            "materialise(model)"
        )
    for name, tensor in packed.items():
        replace_module(
            model, name, PackedTernaryLinear(tensor, model.get_submodule(name).bias, mode)
        )
    return model


def unpack_layers(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Plain linear layers again, in place: in the dtype the weights had, or `dtype`."""
    for name, module in list(packed_layers(model)):
        replace_module(model, name, module.to_linear(dtype))
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the place of the submodule of that dotted name."""
    parent, _, last = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), last, module)
