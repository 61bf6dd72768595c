"""What a verification cost, in tokens and FLOPs, and what the way that it replaces would have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultraclean.proxy_model import Packed
    from ultraclean.verification import Recipe


def ledger_of(
    weights: int, pools: int, judged: Mapping[str, Packed], recipe: Recipe, base: Path
) -> dict[str, float]:
    """Training costs six FLOPs for a weight and token, a forward pass two (Kaplan et al. 2020)."""
    arms = (pools + 1) * recipe.seeds
    trained = arms * recipe.steps * recipe.batch * recipe.length
    windows = sum(
        min(recipe.eval_windows, max(1, len(p.tokens) // recipe.length)) for p in judged.values()
    )
    measured = arms * windows * recipe.length
    ledger: dict[str, float] = {
        "weights": weights,
        "arms": arms,
        "tokens_trained": trained,
        "tokens_measured": measured,
        "flops": 6.0 * weights * trained + 2.0 * weights * measured,
    }
    facts = base / "base.json"
    if facts.is_file():
        tokens = json.loads(facts.read_text(encoding="utf-8"))["tokens"]
        ledger["base_tokens"] = tokens
        ledger["base_flops"] = 6.0 * weights * tokens
        # The way it replaces: each arm from scratch, as long as the base and the decay together.
        scratch = 6.0 * weights * arms * (tokens + recipe.steps * recipe.batch * recipe.length)
        ledger["scratch_flops"] = scratch
        ledger["share_of_scratch"] = ledger["flops"] / scratch
        ledger["share_of_scratch_with_base"] = (ledger["flops"] + ledger["base_flops"]) / scratch
    return ledger
