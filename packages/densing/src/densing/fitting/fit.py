"""Fit a form to observations: score a grid of starts, optimise the best, keep the best of those."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from densing.fitting.forms import Form, form_from_dict
from densing.fitting.minimise import minimise
from densing.fitting.objective import HuberObjective

# Of a grid of a thousand starts most are hopeless; the best few dozen hold every basin.
POLISHED_STARTS = 32
AGREEMENT = 1e-6


@dataclass(frozen=True)
class Fit:
    """Fitted constants, and what they were fitted to.

    Attributes:
        form: what was fitted.
        constants: name -> value; units are in `form.constants`.
        objective: summed Huber loss at the optimum.
        delta: Huber's δ, in units of the target; infinite for least squares.
        observations: how many.
        starts: how many starting points were optimised; `agreeing`: how many of them ended within
            1e-6 (relative) of the best. Few of many means a hard or underdetermined fit.
        r_squared: of the target, in sample: do not judge a fit by it, see `hold_out`.
        rms: root mean square residual of the target.
        ranges: column -> (least, greatest) of what was fitted to; beyond is extrapolation.
        data_sha256: hash of the observations as float64.
        notes: what the caller wants to keep with it.
    """

    form: Form
    constants: dict[str, float]
    objective: float
    delta: float
    observations: int
    starts: int
    agreeing: int
    r_squared: float
    rms: float
    ranges: dict[str, tuple[float, float]]
    data_sha256: str
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def theta(self) -> np.ndarray:
        """The optimiser's coordinates `[P]`."""
        return self.form.to_coordinates(np.array(list(self.constants.values())))

    def predict(self, *columns: Sequence[float] | np.ndarray | float) -> np.ndarray:
        """What the form gives at inputs (one argument for each of `form.inputs`), `[n]`."""
        x = np.stack([np.atleast_1d(np.asarray(c, np.float64)) for c in columns])
        prediction, _ = self.form.evaluate(self.theta[None], self.form.features(x))
        return self.form.untarget(prediction[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives an equal object back."""
        return {
            "form": self.form.to_dict(),
            "constants": self.constants,
            "units": self.form.constants,
            "inputs": self.form.inputs,
            "output": list(self.form.output),
            "objective": self.objective,
            "huber_delta": None if np.isinf(self.delta) else self.delta,
            "observations": self.observations,
            "starts": self.starts,
            "agreeing": self.agreeing,
            "r_squared": self.r_squared,
            "rms": self.rms,
            "ranges": {k: list(v) for k, v in self.ranges.items()},
            "data_sha256": self.data_sha256,
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fit:
        """The fit that `to_dict` wrote.

        Raises:
            ValueError: a key is missing, or the constants are not those of the form.
        """
        try:
            form = form_from_dict(values["form"])
            delta = values["huber_delta"]
            found = cls(
                form=form,
                constants={k: float(v) for k, v in values["constants"].items()},
                objective=values["objective"],
                delta=np.inf if delta is None else delta,
                observations=values["observations"],
                starts=values["starts"],
                agreeing=values["agreeing"],
                r_squared=values["r_squared"],
                rms=values["rms"],
                ranges={k: (v[0], v[1]) for k, v in values["ranges"].items()},
                data_sha256=values["data_sha256"],
                notes=dict(values["notes"]),
            )
        except KeyError as error:
            raise ValueError(f"not a fit: the key {error} is missing") from None
        if list(found.constants) != list(form.constants):
            raise ValueError(
                f"not a fit of {form.name}: constants {list(found.constants)}, "
                f"expected {list(form.constants)}"
            )
        return found


def observations(form: Form, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The columns of a form, checked: inputs `[K, n]` and output `[n]`, float64.

    Raises:
        ValueError: a column is missing, lengths differ, fewer observations than constants, or a
            value the form cannot take; the message gives its place.
    """
    wanted = [*form.inputs, form.output[0]]
    missing = [name for name in wanted if name not in data]
    if missing:
        raise ValueError(
            f"{form.name} needs the columns {', '.join(wanted)}: missing {', '.join(missing)}, "
            f"found {', '.join(map(str, data)) or 'none'}"
        )
    columns = {name: np.asarray(data[name], np.float64).ravel() for name in wanted}
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected as many of each, got {sizes}")
    need = len(form.constants)
    if sizes[wanted[0]] < need:
        raise ValueError(
            f"{need} constants need at least {need} observations, got {sizes[wanted[0]]}"
        )
    for name, column in columns.items():
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad):
            raise ValueError(f"{name}[{bad[0]}] is {column[bad[0]]}: expected a finite number")
    x, y = np.stack([columns[n] for n in form.inputs]), columns[wanted[-1]]
    problem = form.problem(x, y)
    if problem:
        raise ValueError(problem)
    return x, y


def fit(
    form: Form,
    data: Mapping[str, Any],
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    delta: float | None = None,
    polished_starts: int = POLISHED_STARTS,
    notes: Mapping[str, Any] | None = None,
) -> Fit:
    """Fit a form by summed Huber loss, from the best starts of a grid.

    Args:
        form: what to fit.
        data: column -> values: the form's inputs and its output (see `form.inputs`).
        weights: one non-negative weight for each observation; 1 by default.
        delta: Huber's δ in units of the target; the form's own by default.
        polished_starts: how many of the grid's starts are optimised.
        notes: kept in the result.

    Raises:
        ValueError: see `observations`; or no start leads anywhere.
    """
    x, y = observations(form, data)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    if w.shape != y.shape or not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise ValueError(f"weights: expected {len(y)} non-negative numbers, not all zero")
    bound = form.delta if delta is None else float(delta)
    if not bound > 0:
        raise ValueError(f"delta must be positive, got {delta}")
    z, t = form.features(x), form.target(y)
    best = best_starts(form, z, t, w, bound, polished_starts)
    found = minimise(HuberObjective(form, z, t, w, bound), best)
    if not np.isfinite(found.value).any():
        raise ValueError(f"{form.name}: no starting point gives a finite objective for these data")
    index = int(np.argmin(found.value))
    value = float(found.value[index])
    # A line's optimum is given, not searched for: one step of least squares is exact.
    constants = form.to_constants(found.theta[index])
    residual = form.evaluate(found.theta[index][None], z)[0][0] - t
    spread = float((w * (t - np.average(t, weights=w)) ** 2).sum())
    return Fit(
        form=form,
        constants=dict(zip(form.constants, map(float, constants), strict=True)),
        objective=value,
        delta=bound,
        observations=len(y),
        starts=len(best),
        agreeing=int((found.value <= value + AGREEMENT * abs(value) + 1e-18).sum()),
        r_squared=1 - float((w * residual**2).sum()) / spread if spread > 0 else 0.0,
        rms=float(np.sqrt(np.average(residual**2, weights=w))),
        ranges={
            name: (float(column.min()), float(column.max()))
            for name, column in zip([*form.inputs, form.output[0]], [*x, y], strict=True)
        },
        data_sha256=data_hash([*form.inputs, form.output[0]], [*x, y]),
        notes=dict(notes or {}),
    )


def best_starts(
    form: Form, z: np.ndarray, t: np.ndarray, weights: np.ndarray, delta: float, count: int
) -> np.ndarray:
    """The `count` best points of the form's grid, `[<= count, P]`."""
    grid = form.starts(z, t)
    if len(grid) <= 1:
        return grid
    objective = HuberObjective(form, z, t, weights, delta)
    rows = max(1, 200_000 // max(1, len(t)))  # a few megabytes at a time stay in cache
    values = np.concatenate(
        [
            objective.evaluate(grid[i : i + rows], np.arange(i, min(i + rows, len(grid))))[0]
            for i in range(0, len(grid), rows)
        ]
    )
    return grid[np.argsort(values, kind="stable")[:count]]


def data_hash(names: Sequence[str], columns: Sequence[np.ndarray]) -> str:
    """SHA-256 of named float64 columns."""
    digest = hashlib.sha256()
    for name, column in zip(names, columns, strict=True):
        digest.update(json.dumps([name, len(column)]).encode())
        digest.update(np.ascontiguousarray(column, "<f8").tobytes())
    return digest.hexdigest()
