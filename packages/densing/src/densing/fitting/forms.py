"""What can be fitted: each form says how it predicts, and how a gradient flows back through it.

Letters: S problems at once, P coordinates, K inputs, n observations. A *coordinate* is what the
optimiser moves (ln a, so that a stays positive); a *constant* is what the reader wants (a).

A form predicts the *target*, which is the logarithm of a loss (relative errors count alike for
large and small losses) and a score as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

Pullback = Callable[[np.ndarray], np.ndarray]
"""Gradient by the prediction `[S, n]` -> gradient by the coordinates `[S, P]`."""


@dataclass(frozen=True)
class Form(ABC):
    """Base of all forms. A new law is a subclass with the seven members below.

    Attributes:
        name: what the form is called in a file.
        inputs: column name -> unit, in the order in which `x` has its rows.
        output: (column name, unit) of what is observed.
        delta: where Huber's loss turns from square to linear, in units of the target.
    """

    name: ClassVar[str]
    inputs: ClassVar[dict[str, str]]
    output: ClassVar[tuple[str, str]]
    delta: ClassVar[float]

    @property
    @abstractmethod
    def constants(self) -> dict[str, str]:
        """Constant -> unit, in the order of the coordinates."""

    @property
    @abstractmethod
    def free(self) -> np.ndarray:
        """Uncertainty `[P]` of a coordinate from which on it counts as not identified."""

    @abstractmethod
    def to_constants(self, theta: np.ndarray) -> np.ndarray:
        """Coordinates `[..., P]` to constants `[..., P]`."""

    @abstractmethod
    def to_coordinates(self, constants: np.ndarray) -> np.ndarray:
        """Constants `[..., P]` to coordinates `[..., P]`."""

    @abstractmethod
    def features(self, x: np.ndarray) -> np.ndarray:
        """What is computed once from the inputs `[K, n]` before fitting."""

    def target(self, y: np.ndarray) -> np.ndarray:
        """What is compared with the prediction."""
        return y

    def untarget(self, t: np.ndarray) -> np.ndarray:
        """The inverse of `target`."""
        return t

    @abstractmethod
    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, Pullback]:
        """Prediction `[S, n]` at coordinates `[S, P]` and features, and its pullback."""

    @abstractmethod
    def starts(self, z: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Grid of starting coordinates `[S, P]` for features `z` and targets `t`."""

    def problem(self, x: np.ndarray, y: np.ndarray) -> str | None:
        """Why these observations cannot be fitted, naming the first bad one; None if they can."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Name and options, from which `form_from_dict` makes the form again."""
        return {"name": self.name, **asdict(self)}


def grid(*axes: np.ndarray | list[float]) -> np.ndarray:
    """Every combination of the axes' values, `[product, axes]`."""
    return np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], axis=1)


def first_not_positive(names: list[str], rows: list[np.ndarray]) -> str | None:
    """A message on the first value that is not positive (NaN included), or None."""
    for name, row in zip(names, rows, strict=True):
        bad = np.flatnonzero(~(row > 0))
        if len(bad):
            return f"{name}[{bad[0]}] is {row[bad[0]]}: expected a positive number"
    return None


@dataclass(frozen=True)
class Line(Form):
    """y = slope·x + intercept, by least squares: a trend of ln ρ, or a family's logit of score.

    Args:
        x_unit, y_unit: written beside the constants.
    """

    x_unit: str = field(default="1")
    y_unit: str = field(default="1")

    name: ClassVar[str] = "line"
    inputs: ClassVar[dict[str, str]] = {"x": "see x_unit"}
    output: ClassVar[tuple[str, str]] = ("y", "see y_unit")
    delta: ClassVar[float] = np.inf

    @property
    def constants(self) -> dict[str, str]:  # noqa: D102
        return {"slope": f"{self.y_unit} / ({self.x_unit})", "intercept": self.y_unit}

    @property
    def free(self) -> np.ndarray:  # noqa: D102
        return np.array([np.inf, np.inf])

    def to_constants(self, theta: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.array(theta, np.float64)

    to_coordinates = to_constants

    def features(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.array(x, np.float64)

    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, Pullback]:  # noqa: D102
        def pullback(slope: np.ndarray) -> np.ndarray:
            return np.stack([slope @ z[0], slope.sum(axis=1)], axis=1)

        return theta[:, 0, None] * z[0] + theta[:, 1, None], pullback

    def starts(self, z: np.ndarray, t: np.ndarray) -> np.ndarray:  # noqa: D102
        # The optimum itself: a least-squares line needs no search.
        return np.polyfit(z[0], t, 1)[None]


def form_from_dict(values: dict[str, Any]) -> Form:
    """The form that `Form.to_dict` described.

    Raises:
        ValueError: an unknown name.
    """
    from densing.fitting.power_law import PowerLaw
    from densing.fitting.sigmoid import Sigmoid

    kinds = {kind.name: kind for kind in (PowerLaw, Sigmoid, Line)}
    options = dict(values)
    name = options.pop("name", None)
    if name not in kinds:
        raise ValueError(f"unknown form {name!r}: expected one of {', '.join(kinds)}")
    return kinds[name](**options)
