"""The score that goes with a loss: a falling sigmoid between the score of guessing and the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from densing.fitting.forms import Form, Pullback, grid


@dataclass(frozen=True)
class Sigmoid(Form):
    """S(L) = c / (1 + exp(-γ (L - l))) + d with γ < 0: score from loss. Densing Law eq. 3.

    Args:
        floor: d, the score of guessing, where it is known; None fits it too.
        ceiling: c + d, the best possible score, where it is known; None fits it too.
    """

    floor: float | None = None
    ceiling: float | None = None

    name: ClassVar[str] = "sigmoid"
    inputs: ClassVar[dict[str, str]] = {"loss": "nats per token"}
    output: ClassVar[tuple[str, str]] = ("score", "fraction")
    delta: ClassVar[float] = 0.02

    def __post_init__(self) -> None:
        """Refuse a range that is none."""
        low, high = self.floor or 0.0, 1.0 if self.ceiling is None else self.ceiling
        if not 0 <= low < high <= 1:
            raise ValueError(f"expected 0 <= floor < ceiling <= 1, got {low} and {high}")

    @property
    def constants(self) -> dict[str, str]:  # noqa: D102
        found = {"gamma": "1 / loss", "l": "loss"}
        if self.floor is None:
            found["d"] = "fraction"
        if self.ceiling is None:
            found["c"] = "fraction"
        return found

    @property
    def free(self) -> np.ndarray:  # noqa: D102
        wide = {"gamma": 0.7, "l": 0.5, "d": 0.1, "c": 0.35}
        return np.array([wide[name] for name in self.constants])

    def _at(self, name: str) -> int:
        return list(self.constants).index(name)

    def to_constants(self, theta: np.ndarray) -> np.ndarray:  # noqa: D102
        out = np.array(theta, np.float64)
        out[..., 0] = -np.exp(out[..., 0])
        if self.ceiling is None:
            out[..., self._at("c")] = np.exp(out[..., self._at("c")])
        return out

    def to_coordinates(self, constants: np.ndarray) -> np.ndarray:  # noqa: D102
        out = np.array(constants, np.float64)
        out[..., 0] = np.log(-out[..., 0])
        if self.ceiling is None:
            out[..., self._at("c")] = np.log(out[..., self._at("c")])
        return out

    def whole(self, constants: dict[str, float]) -> dict[str, float]:
        """All four constants c, γ, l, d, those that were given included."""
        d = constants["d"] if self.floor is None else self.floor
        c = constants["c"] if self.ceiling is None else self.ceiling - d
        return {"c": c, "gamma": constants["gamma"], "l": constants["l"], "d": d}

    def features(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.array(x, np.float64)

    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, Pullback]:  # noqa: D102
        steep = np.exp(theta[:, 0, None])
        distance = z[0] - theta[:, 1, None]
        s = 0.5 * (1 - np.tanh(0.5 * steep * distance))  # 1 / (1 + exp(steep · distance))
        d = theta[:, self._at("d"), None] if self.floor is None else self.floor
        if self.ceiling is None:
            c = np.exp(theta[:, self._at("c"), None])
        else:
            c = self.ceiling - d

        def pullback(slope: np.ndarray) -> np.ndarray:
            gradient = np.empty_like(theta)
            inner = slope * c * s * (1 - s) * -steep  # by the distance
            gradient[:, 0] = (inner * distance).sum(axis=1)  # d/d ln steep = steep · d/d steep
            gradient[:, 1] = -inner.sum(axis=1)
            if self.floor is None:
                by_d = slope if self.ceiling is None else slope * (1 - s)
                gradient[:, self._at("d")] = by_d.sum(axis=1)
            if self.ceiling is None:
                gradient[:, self._at("c")] = (slope * s * c).sum(axis=1)
            return gradient

        return c * s + d, pullback

    def starts(self, z: np.ndarray, t: np.ndarray) -> np.ndarray:  # noqa: D102
        spread = max(float(np.ptp(z[0])), 1e-6)
        axes: list[Any] = [
            np.log(np.array([1.0, 3.0, 8.0, 20.0]) / spread),
            z[0].min() + spread * np.array([-0.5, 0.1, 0.35, 0.65, 0.9, 1.2]),
        ]
        if self.floor is None:
            axes.append([float(t.min()), float(t.min()) - 0.1])
        if self.ceiling is None:
            height = max(float(np.ptp(t)), 1e-3)
            axes.append(np.log([height, 1.5 * height, 3 * height]))
        return grid(*axes)

    def problem(self, x: np.ndarray, y: np.ndarray) -> str | None:  # noqa: D102
        bad = np.flatnonzero(~((y >= 0) & (y <= 1)))
        if len(bad):
            return f"score[{bad[0]}] is {y[bad[0]]}: expected a fraction (percent? divide by 100)"
        return None
