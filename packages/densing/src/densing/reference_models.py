"""Fitting a reference: a ladder's two laws (Densing Law §2.2), or a public family as the anchor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from densing.fitting import Fit, Line, PowerLaw, Sigmoid, bootstrap, fit, identify
from densing.reference import AnyReference, FamilyReference, LossLaw, Reference, ScoreLaw


def fit_reference(
    runs: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    *,
    family: Mapping[str, Any] | None = None,
    tokens: float = 1e12,
    chance: float | None = None,
    ceiling: float | None = None,
    irreducible: bool = False,
    draws: int = 500,
    seed: int = 0,
    name: str = "",
) -> AnyReference:
    """Fit a reference: give `runs` and `scores` (two steps), or `family` (one step).

    Args:
        runs: `parameters`, `tokens`, `loss` of the ladder's models: conditional losses.
        scores: `loss`, `score` of models and checkpoints that share the ladder's vocabulary.
        family: `parameters`, `score` of a public family, two models or more.
        tokens: D₀.
        chance: score of guessing; required for a family, fitted if None for a ladder.
        ceiling: best possible score; 1 for a family, fitted if None for a ladder.
        irreducible: whether the loss law has a constant term; the paper's has none.
        draws: resampled fits, for intervals; 0 for none.
        seed: of the resampling.
        name: of the family, kept with the reference.

    Raises:
        ValueError: neither or both kinds of data, or data that cannot be fitted.
    """
    if (family is None) == (runs is None or scores is None):
        raise ValueError(
            "expected either runs and scores (a ladder: two steps) or family (one step), got "
            + (", ".join(n for n, v in _named(runs, scores, family) if v is not None) or "nothing")
        )
    if family is not None:
        if chance is None:
            raise ValueError("a family needs chance, the score of guessing (MMLU: 0.25)")
        return _family(family, chance, 1.0 if ceiling is None else ceiling, draws, seed, name)
    assert runs is not None and scores is not None
    loss_fit = fit(PowerLaw(irreducible), runs)
    score_fit = fit(Sigmoid(chance, ceiling), scores)
    flags = [*identify(loss_fit, runs), *identify(score_fit, scores)]
    fits = {
        "loss": loss_fit.to_dict(),
        "score": score_fit.to_dict(),
        "flags": [f.message for f in flags],
    }
    found = None
    if draws:
        one = bootstrap(loss_fit, runs, resamples=draws, seed=seed, recheck=0)
        two = bootstrap(score_fit, scores, resamples=draws, seed=seed + 1, recheck=0)
        count = min(len(one.constants), len(two.constants))
        form = Sigmoid(chance, ceiling)
        rows = [
            [*_loss_constants(one.names, x), *_score_constants(form, two.names, y)]
            for x, y in zip(one.constants[:count], two.constants[:count], strict=True)
        ]
        found = np.array(rows)
    return Reference(
        LossLaw(*_loss_constants(tuple(loss_fit.constants), list(loss_fit.constants.values()))),
        ScoreLaw(
            *_score_constants(
                Sigmoid(chance, ceiling),
                tuple(score_fit.constants),
                list(score_fit.constants.values()),
            )
        ),
        tokens,
        loss_fit.ranges["parameters"],
        found,
        fits,
    )


def _named(runs: Any, scores: Any, family: Any) -> list[tuple[str, Any]]:
    return [("runs", runs), ("scores", scores), ("family", family)]


def _loss_constants(names: tuple[str, ...], values: Any) -> list[float]:
    found = dict(zip(names, map(float, values), strict=True))
    return [found[n] for n in ("a", "alpha", "b", "beta")] + [found.get("e", 0.0)]


def _score_constants(form: Sigmoid, names: tuple[str, ...], values: Any) -> list[float]:
    found = form.whole(dict(zip(names, map(float, values), strict=True)))
    return [found[n] for n in ("c", "gamma", "l", "d")]


def _family(
    family: Mapping[str, Any], chance: float, ceiling: float, draws: int, seed: int, name: str
) -> FamilyReference:
    missing = [key for key in ("parameters", "score") if key not in family]
    if missing:
        raise ValueError(f"family needs parameters and score: missing {', '.join(missing)}")
    n = np.asarray(family["parameters"], np.float64)
    s = np.asarray(family["score"], np.float64)
    if len(n) < 2:
        raise ValueError(f"a family of {len(n)} models gives no line: expected at least 2")
    bad = np.flatnonzero(~((s > chance) & (s < ceiling) & (n > 0)))
    if len(bad):
        raise ValueError(
            f"family model {bad[0]} has {n[bad[0]]:g} parameters and score {s[bad[0]]:g}: "
            f"expected a score between chance {chance:g} and {ceiling:g}"
        )
    x, y = np.log(n), np.log((s - chance) / (ceiling - s))
    line: Fit = fit(Line("ln parameters", "logit"), {"x": x, "y": y}, notes={"family": name})
    slope, intercept = line.constants["slope"], line.constants["intercept"]
    found = None
    if draws and len(n) > 2:
        # A handful of models: resampling them often draws one size only. The line's own t
        # distribution (normal residuals) needs no resampling.
        residual = y - slope * x - intercept
        degrees = len(n) - 2
        design = np.stack([x, np.ones_like(x)], axis=1)
        covariance = (residual @ residual) / degrees * np.linalg.inv(design.T @ design)
        draw = np.random.default_rng(seed)
        normal = draw.standard_normal((draws, 2)) @ np.linalg.cholesky(covariance).T
        scale = np.sqrt(degrees / draw.chisquare(degrees, (draws, 1)))
        found = np.array([slope, intercept]) + normal * scale
        found = found[found[:, 0] > 0]  # a family that falls with size is no anchor
    return FamilyReference(
        slope,
        intercept,
        chance,
        ceiling,
        name,
        (float(n.min()), float(n.max())),
        found,
        {"line": line.to_dict()},
    )


def reference_to_dict(reference: AnyReference) -> dict[str, Any]:
    """JSON-ready, draws included; `reference_from_dict` gives an equal object back."""
    shared = {
        "sizes": [None if np.isinf(v) else v for v in reference.sizes],
        "draws": None if reference.draws is None else reference.draws.tolist(),
        "fits": reference.fits,
    }
    if isinstance(reference, FamilyReference):
        keys = ("slope", "intercept", "chance", "ceiling", "family")
        return {"kind": "family", **{k: getattr(reference, k) for k in keys}, **shared}
    one, two = reference.loss, reference.score
    return {
        "kind": "ladder",
        "loss": {
            "a": one.a, "alpha": one.alpha, "b": one.b, "beta": one.beta,
            "irreducible": one.irreducible,
        },
        "score": {"c": two.c, "gamma": two.gamma, "l": two.l, "d": two.d},
        "tokens": reference.tokens,
        **shared,
    }  # fmt: skip


def reference_from_dict(values: Mapping[str, Any]) -> AnyReference:
    """The reference that `reference_to_dict` wrote.

    Raises:
        ValueError: it is no reference, or one with constants out of range.
    """
    try:
        low, high = values["sizes"]
        draws = None if values["draws"] is None else np.array(values["draws"], np.float64)
        shared = ((low, np.inf if high is None else high), draws, dict(values["fits"]))
        if values["kind"] == "family":
            keys = ("slope", "intercept", "chance", "ceiling", "family")
            return FamilyReference(*(values[k] for k in keys), *shared)
        if values["kind"] == "ladder":
            laws = LossLaw(**values["loss"]), ScoreLaw(**values["score"])
            return Reference(*laws, values["tokens"], *shared)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a reference: {type(error).__name__} {error}") from None
    raise ValueError(f"unknown kind of reference {values['kind']!r}: expected ladder or family")
