"""The loss of a model of N parameters trained on D tokens, with and without irreducible loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from densing.fitting.forms import Form, Pullback, first_not_positive, grid


@dataclass(frozen=True)
class PowerLaw(Form):
    """L(N, D) = a·N^-α + b·D^-β (+ e), fitted in ln L. Densing Law eq. 2; Hoffmann et al. eq. 2.

    Args:
        irreducible: whether there is a constant term e. The Densing Law has none.
    """

    irreducible: bool = True

    name: ClassVar[str] = "power_law"
    inputs: ClassVar[dict[str, str]] = {"parameters": "parameters", "tokens": "tokens"}
    output: ClassVar[tuple[str, str]] = ("loss", "nats per token")
    delta: ClassVar[float] = 1e-3

    @property
    def constants(self) -> dict[str, str]:  # noqa: D102
        found = {
            "a": "loss · parameters^alpha",
            "alpha": "1",
            "b": "loss · tokens^beta",
            "beta": "1",
        }
        return {**found, "e": "loss"} if self.irreducible else found

    @property
    def free(self) -> np.ndarray:  # noqa: D102
        # ln a moves with α · ln N: at N = 1e9 an exponent known to ±0.1 leaves ln a ±2.
        wide = [3.0, 0.15, 3.0, 0.15]
        return np.array([*wide, 0.5] if self.irreducible else wide)

    def to_constants(self, theta: np.ndarray) -> np.ndarray:  # noqa: D102
        out = np.array(theta, np.float64)
        out[..., [0, 2]] = np.exp(out[..., [0, 2]])
        if self.irreducible:
            out[..., 4] = np.exp(out[..., 4])
        return out

    def to_coordinates(self, constants: np.ndarray) -> np.ndarray:  # noqa: D102
        out = np.array(constants, np.float64)
        logged = [0, 2, 4] if self.irreducible else [0, 2]
        out[..., logged] = np.log(np.maximum(out[..., logged], 1e-300))
        return out

    def features(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.log(x)

    def target(self, y: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.log(y)

    def untarget(self, t: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.exp(t)

    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, Pullback]:  # noqa: D102
        terms = np.empty((3 if self.irreducible else 2, len(theta), z.shape[1]))
        for i in range(2):
            np.multiply(theta[:, 2 * i + 1, None], -z[i], out=terms[i])
            terms[i] += theta[:, 2 * i, None]
        if self.irreducible:
            terms[2] = theta[:, 4, None]
        top = terms.max(axis=0)  # log-sum-exp: no term leaves the range of a float
        terms -= top
        np.exp(terms, out=terms)
        total = terms.sum(axis=0)
        terms /= total  # now each term's share of the loss, the derivative by its logarithm

        def pullback(slope: np.ndarray) -> np.ndarray:
            gradient = np.empty_like(theta)
            for i in range(2):
                share = slope * terms[i]
                gradient[:, 2 * i] = share.sum(axis=1)
                gradient[:, 2 * i + 1] = -(share @ z[i])
            if self.irreducible:
                gradient[:, 4] = (slope * terms[2]).sum(axis=1)
            return gradient

        return top + np.log(total), pullback

    def starts(self, z: np.ndarray, t: np.ndarray) -> np.ndarray:  # noqa: D102
        # Hoffmann et al. §3.3 use a grid of absolute values; here each term's size is given at the
        # middle of the data, so that the same grid serves losses per byte and other units of N.
        middle, low = z.mean(axis=1), float(t.min())
        sizes, exponents = [-4.0, -2.5, -1.0, 0.0], [0.1, 0.25, 0.4, 0.6, 1.0]
        axes = [sizes, exponents, sizes, exponents]
        if self.irreducible:
            axes.append([low - 6.0, low - 1.5, low - 0.5, low - 0.15])
        points = grid(*axes)
        for i in range(2):
            points[:, 2 * i] += float(t.mean()) + points[:, 2 * i + 1] * middle[i]
        return points

    def problem(self, x: np.ndarray, y: np.ndarray) -> str | None:  # noqa: D102
        return first_not_positive([*self.inputs, self.output[0]], [*x, y])
