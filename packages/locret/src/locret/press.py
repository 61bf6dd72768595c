"""Retaining heads as a press of NVIDIA's kvpress: its pipeline, wrappers and evaluation.

kvpress compresses after the whole prompt was prefilled with a full cache, so scores and what is
kept are Locret's, and the bound on memory during prefill is not. kvpress 0.5 wants transformers
below 5.3 and so an environment of its own; nothing else of this package that is needed here minds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from locret.heads import RetainingHeads
from locret.retaining_head import qkv_input

try:
    from kvpress import ScorerPress
    from kvpress.utils import get_prerope_key_states, get_prerope_query_states
except ImportError as error:
    raise ImportError(
        "locret.press needs kvpress >= 0.5, which needs transformers < 5.3: make an environment "
        "for it, and there pip install kvpress minicpm4-locret"
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class LocretPress(ScorerPress):
    """Keep what trained heads score highest, as many entries for each head.

    Args:
        compression_ratio: share of the entries that goes, in [0, 1).
        heads: trained heads, or the folder that `locret train` wrote.

    Raises:
        ValueError: no heads, or (when a model is given) heads of another model.
        FileNotFoundError: a folder without heads.
    """

    heads: RetainingHeads | str | Path | None = None

    def __post_init__(self) -> None:
        """Read heads where a folder was given."""
        super().__post_init__()
        if self.heads is None:
            raise ValueError("LocretPress needs heads=, RetainingHeads or their folder; got None")
        if not isinstance(self.heads, RetainingHeads):
            self.heads = RetainingHeads.load(self.heads)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Check the heads against the model, and move them to its device."""
        self.heads.check(model)
        self.heads.to(model.device)

    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor,
        attentions: Tensor | None, kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """R(x) of every token, `[B, J, n]`; arguments as kvpress gives them to any scorer."""
        x = hidden_states
        if self.heads.config.input == "qkv":
            q = get_prerope_query_states(module, hidden_states)
            x = qkv_input(q, get_prerope_key_states(module, hidden_states), values)
        head = self.heads.layers[module.layer_idx]
        return head(x.to(head.fc2.weight.dtype)).detach()
