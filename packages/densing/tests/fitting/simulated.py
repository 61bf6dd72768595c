"""Observations drawn from known laws."""

from __future__ import annotations

import numpy as np

CHINCHILLA = {"a": 482.01, "alpha": 0.3478, "b": 2085.43, "beta": 0.3658, "e": 1.8169}


def runs(
    count: int = 240, noise: float = 0.004, seed: int = 0, irreducible: bool = True
) -> dict[str, np.ndarray]:
    """Training runs around the compute-optimal line, in the shape of Hoffmann et al.'s."""
    draw = np.random.default_rng(seed)
    flops = 10 ** draw.uniform(18.3, 21.5, count)
    parameters = np.sqrt(flops / 120) * 10 ** draw.uniform(-0.6, 0.6, count)
    tokens = flops / 6 / parameters
    c = CHINCHILLA
    loss = c["a"] * parameters ** -c["alpha"] + c["b"] * tokens ** -c["beta"]
    loss = (loss + c["e"] * irreducible) * np.exp(noise * draw.standard_t(3, count))
    return {"parameters": parameters, "tokens": tokens, "loss": loss}


def scores(count: int = 30, noise: float = 0.01, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores that fall with the loss: c 0.6, γ -4, l 2.4, d 0.25."""
    loss = np.linspace(1.4, 3.6, count)
    score = 0.25 + 0.6 / (1 + np.exp(4 * (loss - 2.4)))
    return {"loss": loss, "score": score + np.random.default_rng(seed).normal(0, noise, count)}
