"""Locret's trained retaining heads as the compressor, as in the paper; needs the locret tool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from apb.plan import Layer


class LocretHeads:
    """Scores by retaining heads (arXiv 2410.01805), one for each layer; works in models only.

    heads: a folder that `RetainingHeads.save` wrote, or the heads.
    Raises ImportError without locret, ValueError and FileNotFoundError for unfit folders.
    """

    reads_inputs: ClassVar[bool] = True

    def __init__(self, heads: str | Path | Any) -> None:
        if isinstance(heads, str | Path):
            heads = _locret("heads").RetainingHeads.load(heads)
        self.heads = heads

    def check(self, model: PreTrainedModel) -> None:
        """ValueError where the heads were made for a model of another shape."""
        self.heads.check(model)

    def at_layer(self, layer: Layer, first: int, end: int) -> Callable[..., Tensor]:
        """The scorer of rows first .. end - 1 of one layer."""
        context = layer.context
        head = self.heads.layers[layer.index].to(layer.k.device)

        @torch.no_grad()
        def score(q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int) -> Tensor:
            if self.heads.config.input == "hidden":
                return head(context.hidden[:, first:end].float())
            interface, qkv = _locret("interface"), _locret("retaining_head").qkv_input
            cos, sin = (x[:, first:end] for x in context.rotation)
            call = interface.Call(
                context.module, layer.index, q, k, v, context.hidden, (cos, sin), None,
                layer.scaling,
            )  # fmt: skip
            return head(qkv(*call.unrotated(), v).float())

        return score

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, query: Tensor, host: int) -> Tensor:
        """Refused: heads read a layer's input."""
        raise ValueError("LocretHeads scores inside a model: use apb.prefill, not apb_prefill")


def _locret(module: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"locret.{module}")
    except ImportError as error:
        raise ImportError(
            "LocretHeads needs the locret tool: pip install minicpm4-locret, or use another "
            "compressor such as query-attention"
        ) from error
