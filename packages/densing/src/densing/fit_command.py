"""`densing fit`: a loss law with intervals, flags and held-out errors; with scores, a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from densing.fitting import PowerLaw, bootstrap, hold_out, identify, profile
from densing.fitting import fit as fit_form
from densing.outcome import Result, finite
from densing.reference_models import fit_reference, reference_to_dict
from densing.sources import load_columns


def fit(
    runs: Path,
    scores: Path | None,
    columns: Sequence[str],
    irreducible: bool,
    tokens: float,
    chance: float | None,
    hold_out_above: float | None,
    resamples: int,
    seed: int,
) -> Result:
    """Loss law with intervals, flags and held-out errors; with scores, a reference."""
    data = load_columns(runs, ("parameters", "tokens", "loss"), columns)
    form = PowerLaw(irreducible)
    found = fit_form(form, data, notes={"file": runs.name})
    boot = bootstrap(found, data, resamples=resamples, seed=seed)
    lines = [
        f"{found.observations} runs, objective {found.objective:.6g}, {found.agreeing} of "
        f"{found.starts} starts agree, root mean square residual {found.rms:.3%}"
    ]
    intervals = {}
    for name, unit in form.constants.items():
        low, high = boot.interval(name)
        narrow = profile(found, data, name)
        intervals[name] = {
            "bootstrap": [low, high],
            "profile": [finite(narrow.low), finite(narrow.high)],
        }
        lines.append(
            f"  {name:<6} {found.constants[name]:>12.6g}   bootstrap {low:.5g} – {high:.5g}   "
            f"profile {narrow.low:.5g} – {narrow.high:.5g}   [{unit}]"
        )
    flags = identify(found, data)
    lines += [f"  flag: {flag.message}" for flag in flags]
    if boot.failed or boot.improved:
        lines.append(
            f"  {boot.failed} of {resamples} resamples failed, {boot.improved} of "
            f"{boot.rechecked} rechecked had a better optimum"
        )
    values: dict[str, Any] = {
        **found.to_dict(),
        "intervals": intervals,
        "flags": [f.message for f in flags],
    }
    if hold_out_above is not None:
        check = hold_out(form, data, data["parameters"] > hold_out_above)
        worst = float(np.abs(check.relative_errors).max())
        lines.append(
            f"held out above {hold_out_above:.3g} parameters: {len(check.observed)} runs, "
            f"mean error {check.mean_absolute_error:.4f}, worst {worst:.2%}"
        )
        values["hold_out"] = check.to_dict()
    if scores is not None:
        points = load_columns(scores, ("loss", "score"), columns)
        reference = fit_reference(
            data, points, tokens=tokens, chance=chance, irreducible=irreducible, seed=seed,
            draws=min(resamples, 500),
        )  # fmt: skip
        law = reference.score  # type: ignore[union-attr]
        lines.append(
            f"score law: c {law.c:.4g}, gamma {law.gamma:.4g}, l {law.l:.4g}, d {law.d:.4g}"
        )
        lines += [f"  flag: {m}" for m in reference.fits["flags"] if m not in values["flags"]]
        values = reference_to_dict(reference)
    return Result("\n".join(lines), values)
