"""Efficient verification (Ultra-FineWeb, arXiv 2505.05427 §3; MiniCPM4 §2.2.1): does a pool help?

Instead of training from scratch on each candidate, a nearly trained model is annealed: its rate
decays to nothing over a short run on 30 % candidate and 70 % default mix. The control is the same
run on the default mix alone. What differs is the candidate's doing, or chance: so each arm runs
with several seeds, the arms of one seed see the same default windows in the same places, and a gain
is the mean of the paired differences with its standard error.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ultraclean import proxy_model
from ultraclean._files import write_json
from ultraclean.ledger import ledger_of
from ultraclean.processes import Alone, launched
from ultraclean.proxy_model import Packed, bits_per_byte, load, pack, parameters

CONTROL = "control"
MEAN = "mean"


@dataclass(frozen=True)
class Recipe:
    """How an arm is annealed.

    Args:
        candidate: share of windows from the pool (paper: 0.3).
        tokens: of one arm (paper: 10 billion for 1 billion weights).
        batch, length: windows in a step, tokens predicted in one.
        lr: rate at the start of the decay; the base's own at its end.
        final_ratio: last rate divided by the first.
        seeds: runs of each arm; at least 2, or there is no standard error.
        eval_windows: most windows of an evaluation.
        confidence: one-sided, of the accept rule.
    """

    candidate: float = 0.3
    tokens: int = 100_000
    batch: int = 16
    length: int = 128
    lr: float = 3e-3
    final_ratio: float = 0.02
    seeds: int = 3
    eval_windows: int = 200
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what makes no experiment."""
        if not 0 < self.candidate <= 1:
            raise ValueError(f"candidate must be in (0, 1], got {self.candidate}")
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, got {self.seeds}: one has no error bar")
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0.5, 1), got {self.confidence}")
        if min(self.tokens, self.batch, self.length, self.eval_windows) < 1 or not self.lr > 0:
            raise ValueError("tokens, batch, length, eval_windows and lr must be positive")

    @property
    def steps(self) -> int:
        """Optimiser steps of an arm."""
        return max(1, self.tokens // (self.batch * self.length))


@dataclass(frozen=True)
class Gain:
    """By how much an arm beats the control on one evaluation, in bits per byte; > 0 is better."""

    pool: str
    evaluation: str
    gain: float
    error: float
    """Standard error of the mean over seeds."""
    needed: float
    """What the gain must exceed: Student's quantile times the error."""

    @property
    def verdict(self) -> str:
        """`helps`, `hurts` or `within noise`."""
        if self.gain > self.needed:
            return "helps"
        return "hurts" if self.gain < -self.needed else "within noise"


@dataclass(frozen=True)
class Verification:
    """What the arms showed.

    Attributes:
        gains: of each pool on each evaluation, and on their mean, which decides.
        losses: arm -> evaluation -> bits per byte of each seed.
        ledger: tokens and FLOPs spent, and what training from scratch would have cost.
    """

    gains: list[Gain]
    losses: dict[str, dict[str, list[float]]]
    ledger: dict[str, float] = field(default_factory=dict)

    def of(self, pool: str, evaluation: str = MEAN) -> Gain:
        """One gain."""
        return next(g for g in self.gains if (g.pool, g.evaluation) == (pool, evaluation))

    @property
    def accepted(self) -> list[str]:
        """Pools whose mean gain is more than noise, the best first."""
        found = [g for g in self.gains if g.evaluation == MEAN and g.verdict == "helps"]
        return [g.pool for g in sorted(found, key=lambda g: -g.gain)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        gains = [{**asdict(g), "verdict": g.verdict} for g in self.gains]
        return {"gains": gains, "accepted": self.accepted, "losses": self.losses,
                "ledger": self.ledger}  # fmt: skip

    def table(self) -> str:
        """For reading."""
        rows = [f"{'pool':20} {'evaluation':14} {'gain (bits/byte)':>22}  verdict"]
        rows += [
            f"{g.pool:20.20} {g.evaluation:14.14} {g.gain:+11.4f} ± {g.error:.4f}     {g.verdict}"
            for g in self.gains
        ]
        return "\n".join(rows)


def verify(
    base: str | Path,
    pools: Mapping[str, Iterable[str]],
    default: Iterable[str],
    evaluations: Mapping[str, Iterable[str]],
    recipe: Recipe,
    output: str | Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
    micro: int = 0,
) -> Verification:
    """Anneal `base` on each pool and on the default mix alone, with several seeds; compare.

    Each (arm, seed) is kept in `output/cells`: after a kill the same call goes on with the next.
    `output/verification.json` holds the result.

    Under torchrun or accelerate the processes train each arm together, by DDP or DeepSpeed
    (`processes.py`): on the tokens that one process would see, so that losses are equal but for
    rounding. All must see the same files; rank 0 alone writes.

    Args:
        base: Hugging Face folder of a nearly trained causal model; see `make_base`.
        pools: name -> texts of a candidate.
        default: texts of the default mix.
        evaluations: name -> texts that nobody trains on.
        recipe: how.
        output: folder.
        progress: called with (arms done, of how many), on rank 0.
        micro: most windows that a process trains on at a time, for memory's sake; 0, all.

    Raises:
        ValueError: an empty pool, a pool named `control`, an evaluation named `mean`, or
            training that diverges.
        FileNotFoundError, ImportError: as `proxy_model.load`.
    """
    if not pools or CONTROL in pools:
        raise ValueError(f"name at least one pool, and none {CONTROL!r}: got {list(pools)}")
    if not evaluations or MEAN in evaluations:
        raise ValueError(f"name at least one evaluation, and none {MEAN!r}: got {[*evaluations]}")
    folder, processes = Path(output), launched()
    model, tokenizer = load(base)
    mix = pack(default, tokenizer)
    packed = {name: pack(texts, tokenizer) for name, texts in pools.items()}
    judged = {
        name: pack(texts, tokenizer, recipe.eval_windows * recipe.length * 4)
        for name, texts in evaluations.items()
    }
    arms = [CONTROL, *packed]
    losses: dict[str, dict[str, list[float]]] = {arm: {e: [] for e in judged} for arm in arms}
    done = 0
    weights = (w.cpu().numpy() for w in model.state_dict().values())
    shared = _hash(recipe, mix, *judged.values(), *weights)
    for seed in range(recipe.seeds):
        for arm in arms:
            pool = packed.get(arm)
            key = _hash(shared, arm, seed, pool)
            cell = folder / "cells" / f"{key[:24]}.json"
            found = processes.agree(lambda cell=cell: _measured(cell))
            if found is None:
                annealed = copy.deepcopy(model)
                _anneal(annealed, mix, pool, recipe, seed, micro, processes)
                found = {
                    name: bits_per_byte(annealed, p, recipe.length, micro or recipe.batch,
                                        recipe.eval_windows, processes)
                    for name, p in judged.items()
                }  # fmt: skip
                if processes.writes:
                    write_json(cell, {"arm": arm, "seed": seed, "bits_per_byte": found})
            for name in judged:
                losses[arm][name].append(found[name])
            done += 1
            if processes.writes:
                progress(done, len(arms) * recipe.seeds)
    result = Verification(
        [gain for arm in packed for gain in _gains(arm, losses, recipe)],
        losses,
        ledger_of(parameters(model), len(packed), judged, recipe, Path(base)),
    )
    if processes.writes:
        write_json(folder / "verification.json", {"recipe": asdict(recipe), **result.to_dict()})
    return result


def _measured(cell: Path) -> dict[str, float] | None:
    if not cell.is_file():
        return None
    return json.loads(cell.read_text(encoding="utf-8"))["bits_per_byte"]


def _anneal(
    model: Any, mix: Packed, pool: Packed | None, recipe: Recipe, seed: int, micro: int,
    processes: Alone,
) -> None:  # fmt: skip
    """One arm: the rate falls linearly to `final_ratio` of itself."""
    taken = max(1, round(recipe.candidate * recipe.batch))

    def batches(step: int) -> np.ndarray:
        draw = np.random.default_rng([seed, step])
        starts = draw.integers(0, 1 << 40, recipe.batch)
        rows = [mix.window(int(s % len(mix.tokens)), recipe.length) for s in starts]
        if pool is not None:  # in the place of the first rows; the others are the control's
            for i, start in enumerate(draw.integers(0, 1 << 40, taken)):
                rows[i] = pool.window(int(start % len(pool.tokens)), recipe.length)
        return np.stack(rows)

    def rate(step: int) -> float:
        return recipe.lr * (1 - (1 - recipe.final_ratio) * (step + 1) / recipe.steps)

    proxy_model.train(model, batches, rate, recipe.steps, micro, processes)


def _gains(arm: str, losses: dict[str, dict[str, list[float]]], recipe: Recipe) -> list[Gain]:
    found = []
    paired = {
        name: np.array(losses[CONTROL][name]) - np.array(losses[arm][name]) for name in losses[arm]
    }
    for name, gains in {**paired, MEAN: np.mean(list(paired.values()), axis=0)}.items():
        error = float(gains.std(ddof=1) / math.sqrt(len(gains)))
        needed = student_quantile(recipe.confidence, len(gains) - 1) * error
        found.append(Gain(arm, name, float(gains.mean()), error, needed))
    return found


def student_quantile(confidence: float, freedom: int) -> float:
    """Quantile of Student's distribution, by bisection of its integral.

    Args:
        confidence: in (0.5, 1).
        freedom: degrees, >= 1.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    low, high = 0.0, 1e4
    # t = tan(a)·√freedom turns the density's integral into one of cos^(freedom − 1) over a finite
    # range.
    angles = np.linspace(0, math.pi / 2, 20_001)
    heights = np.cos(angles) ** (freedom - 1) * scale * math.sqrt(freedom)
    area = np.append(0, np.cumsum((heights[1:] + heights[:-1]) / 2 * np.diff(angles)))
    for _ in range(60):
        middle = (low + high) / 2
        below = 0.5 + float(np.interp(math.atan(middle / math.sqrt(freedom)), angles, area))
        low, high = (middle, high) if below < confidence else (low, middle)
    return high


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Packed):
            part = part.tokens
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()
