"""densing: fits against PyPI `chinchilla` and SciPy, inversions, and the law from public scores.

    python benchmarks/densing.py [--chinchilla CSV] [--obsscaling CSV] [--skip-chinchilla]

Without paths the training runs are simulated in the shape of the Chinchilla replication's, and the
law comes from the table that ships. With them: the replication's CSV (columns `Model Size`,
`Training FLOP`, `loss`; the 5 highest losses are dropped, as the replication does) and ObsScaling's
`base_llm_benchmark_eval.csv`. The peer `chinchilla` is optional: pip install chinchilla==0.2.0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, Case, environment, measure, wall_seconds
from scipy.optimize import minimize

from densing import (
    Choices,
    LossLaw,
    Reference,
    ScoreLaw,
    combined_doubling,
    curated_table,
    effective_parameters,
    headline,
    read_csv,
)
from densing.corollaries import DAYS_PER_YEAR
from densing.fitting import PowerLaw, bootstrap, fit, resample
from densing.fitting.fit import best_starts
from densing.sensitivity import table_text

FORM = PowerLaw()
REPEATS = 5


def simulated() -> dict[str, np.ndarray]:
    """240 runs around the compute-optimal line, with the replication's constants and noise."""
    draw = np.random.default_rng(0)
    flops = 10 ** draw.uniform(18.3, 21.5, 240)
    parameters = np.sqrt(flops / 120) * 10 ** draw.uniform(-0.6, 0.6, 240)
    tokens = flops / 6 / parameters
    loss = 482.01 * parameters**-0.3478 + 2085.43 * tokens**-0.3658 + 1.8169
    noise = np.exp(0.004 * draw.standard_t(3, 240))
    return {"parameters": parameters, "tokens": tokens, "loss": loss * noise}


def replication(path: Path) -> dict[str, np.ndarray]:
    """The replication's runs, without the five highest losses."""
    from densing.sources import load_columns

    names = ("parameters", "flops", "loss")
    found = load_columns(path, names, ("parameters=Model Size", "flops=Training FLOP", "loss=loss"))
    keep = np.sort(np.argsort(found["loss"], kind="stable")[:-5])
    n, c, loss = (found[name][keep] for name in names)
    return {"parameters": n, "tokens": c / (6 * n), "loss": loss}


def objective(theta: np.ndarray, data: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """Summed Huber loss and gradient as a careful user writes them for SciPy."""
    log_n, log_d, log_l = (np.log(data[k]) for k in ("parameters", "tokens", "loss"))
    terms = np.stack(
        [theta[0] - theta[1] * log_n, theta[2] - theta[3] * log_d, np.full_like(log_n, theta[4])]
    )
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    residual = top + np.log(total) - log_l
    clipped = np.clip(residual, -1e-3, 1e-3) * data.get("weights", 1.0)
    value = np.abs(clipped * (residual - 0.5 * np.clip(residual, -1e-3, 1e-3))).sum()
    share = clipped * weights / total
    gradient = [
        share[0].sum(),
        -(share[0] @ log_n),
        share[1].sum(),
        -(share[1] @ log_d),
        share[2].sum(),
    ]
    return float(value), np.array(gradient)


def value_at(constants: list[float], data: dict[str, np.ndarray]) -> float:
    """The objective at constants a, α, b, β, e."""
    return objective(FORM.to_coordinates(np.array(constants)), data)[0]


def no_worse(found: float, peer: float) -> None:
    """The gate: our objective must not lie above the peer's."""
    assert found <= peer * (1 + 1e-9), f"ours {found:.9g} is worse than the peer's {peer:.9g}"


def fits(data: dict[str, np.ndarray], skip: bool) -> Iterator[dict[str, Any]]:
    """Best fit and bootstraps, timed against peers."""
    ours = lambda: fit(FORM, data).objective  # noqa: E731

    def scipy_starts() -> float:
        z = FORM.features(np.stack([data["parameters"], data["tokens"]]))
        t = np.log(data["loss"])
        starts = best_starts(FORM, z, t, np.ones(len(t)), FORM.delta, 32)
        options = {"gtol": 1e-12, "maxiter": 1000}
        return min(
            minimize(objective, s, args=(data,), jac=True, method="BFGS", options=options).fun
            for s in starts
        )

    seconds = [wall_seconds(ours) for _ in range(REPEATS)]
    yield fact("best fit with multi-start", "s", statistics.median(seconds), below=0.5)
    yield measure(
        Case("best fit, 32 starts", "fits/s", 1, ours, scipy_starts,
             "SciPy BFGS, analytic gradient, the same starts", no_worse, repeats=REPEATS)
    )  # fmt: skip
    if not skip:
        yield from against_chinchilla(data, ours)
    found = fit(FORM, data)
    boot = bootstrap(found, data, resamples=4000, seed=1)
    assert boot.failed == 0 and boot.improved == 0, (boot.failed, boot.improved)
    seconds = [
        wall_seconds(lambda: bootstrap(found, data, resamples=4000, seed=1)) for _ in range(REPEATS)
    ]
    yield fact("4,000 bootstraps", "s", statistics.median(seconds), below=15.0)
    for name in boot.names:
        low, high = boot.interval(name)
        yield fact(f"{name}: standard error", "as the constant", boot.standard_error(name),
                   note=f"{found.constants[name]:.6g}, 95% {low:.5g} to {high:.5g}")  # fmt: skip
    count = 100
    weights = resample(len(data["loss"]), count, seed=1)

    def loop() -> np.ndarray:
        options = {"gtol": 1e-12, "maxiter": 1000}
        return np.array(
            [
                minimize(objective, found.theta, args=({**data, "weights": w},), jac=True,
                         method="BFGS", options=options).x
                for w in weights
            ]
        )  # fmt: skip

    def same(mine: Any, theirs: np.ndarray) -> None:
        # Exponents: their tolerance in a flat valley is what limits the agreement.
        assert np.abs(mine.constants[:, 1] - theirs[:, 1]).max() < 1e-4

    yield measure(
        Case(f"{count} bootstraps", "fits/s", count,
             lambda: bootstrap(found, data, resamples=count, seed=1, recheck=0), loop,
             "SciPy BFGS, analytic gradient, warm start", same, repeats=REPEATS)
    )  # fmt: skip


def against_chinchilla(data: dict[str, np.ndarray], ours: Any) -> Iterator[dict[str, Any]]:
    """PyPI `chinchilla` from its full grid of 5^5 starts, with the same loss, without its plots.

    Three pairs, not five: one of its fits takes more than a minute.
    """
    try:
        import chinchilla
    except ImportError:
        print("(chinchilla is not installed: its row is left out; pip install chinchilla==0.2.0)")
        return
    from chinchilla._metrics import log_huber

    grid = {
        "e": np.linspace(-1, 1, 5),
        "a": np.linspace(0, 25, 5),
        "b": np.linspace(0, 25, 5),
        "alpha": np.linspace(0, 2, 5),
        "beta": np.linspace(0, 2, 5),
    }

    def loss(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        return log_huber(true, predicted, delta=1e-3)

    with tempfile.TemporaryDirectory() as folder:
        peer = chinchilla.Chinchilla(folder, param_grid=grid, loss_fn=loss, log_level=50)
        for n, d, value in zip(*(data[k] for k in ("parameters", "tokens", "loss")), strict=True):
            peer.append(C=6 * n * d, N=n, D=d, loss=value)
        peer.visualizer.optim = lambda *a, **k: None  # drawing is not what is compared

        def run() -> float:
            peer.fit()
            return value_at([peer.A, peer.alpha, peer.B, peer.beta, peer.E], data)

        yield measure(
            Case("best fit with multi-start", "fits/s", 1, ours, run,
                 f"chinchilla 0.2.0, {5**5} starts, all cores", no_worse, bar=20.0,
                 repeats=3)
        )  # fmt: skip


def inversions() -> Iterator[dict[str, Any]]:
    """Round trips over random valid constants, and a million inversions."""
    draw = np.random.default_rng(0)
    worst = 0.0
    for _ in range(2000):
        reference = Reference(
            LossLaw(
                draw.uniform(1, 1e3), draw.uniform(0.1, 0.8), draw.uniform(1, 1e4),
                draw.uniform(0.2, 0.8), draw.uniform(0, 1),
            ),
            ScoreLaw(draw.uniform(0.2, 0.75), -draw.uniform(0.5, 12), draw.uniform(0.2, 3), 0.25),
            10 ** draw.uniform(11, 13),
        )  # fmt: skip
        sizes = 10 ** draw.uniform(6, 12, 50)
        scores = reference.expected_score(sizes)
        # Where the sigmoid is flat, float64 scores do not tell sizes apart.
        steep = np.abs(np.log(reference.expected_score(sizes * 1.001) / scores)) > 1e-8
        found = effective_parameters(scores, reference).parameters
        worst = max(worst, float(np.abs(found[steep] / sizes[steep] - 1).max(initial=0)))
    yield fact("inverse round trip, worst of 100,000", "relative error", worst, below=1e-9)
    reference = Reference(LossLaw(60, 0.3, 100, 0.28), ScoreLaw(0.7, -6.0, 0.5, 0.25), 1e11)
    scores = draw.uniform(0, 1, 1_000_000)
    seconds = [wall_seconds(lambda: effective_parameters(scores, reference)) for _ in range(7)]
    yield fact("1,000,000 inversions", "s", statistics.median(seconds), below=0.5)
    days = combined_doubling(100.5, 2.1 * DAYS_PER_YEAR)
    yield fact("densing 100.5 d × Moore 2.1 y", "days", days, between=(88.85, 88.95))
    yield fact("price ratio 20 / 0.075", "times", 20 / 0.075, between=(266.65, 266.75))


def laws(obsscaling: Path | None) -> Iterator[dict[str, Any]]:
    """Doubling times with their sensitivity, from ObsScaling and from the table that ships."""
    sources = [("shipped table", curated_table(), "LLaMA", ["Llama 2", "Qwen2.5"])]
    if obsscaling is not None:
        table = read_csv(obsscaling).joined(curated_table())
        sources.insert(0, ("ObsScaling", table, "Llama", ["Llama-2", "Qwen1.5"]))
    for name, table, anchor, others in sources:
        found = headline(
            table, Choices(basis="total", anchor=anchor), anchors=others, resamples=2000
        )
        print(f"\n{name}\n{table_text(found)}\n")
        low, high = found.trend.doubling_interval
        bars = {"envelope": (91, 97), "stepped": (107, 115)} if name == "ObsScaling" else {}
        yield fact(f"{name}: MMLU envelope doubling", "days", found.trend.doubling_days,
                   between=bars.get("envelope"), note=f"95% {low:.0f} to {high:.0f}")  # fmt: skip
        for row in found.sensitivity:
            if row.choice in ("estimator", "benchmark", "reference", "minimum size", "parameters"):
                if row.doubling_days is None or row.value == "envelope":
                    continue
                bar = bars.get(row.value)
                note = f"95% {row.low:.0f} to {_end(row.high)}" if row.low else row.note
                yield fact(f"{name}: {row.choice} {row.value}", "days", row.doubling_days,
                           between=bar, note=note)  # fmt: skip


def _end(value: float | None) -> str:
    return "∞" if value is None or math.isinf(value) or value > 99999 else f"{value:.0f}"


def fact(
    name: str,
    unit: str,
    value: float,
    *,
    below: float | None = None,
    between: tuple[float, float] | None = None,
    note: str = "",
) -> dict[str, Any]:
    """A row without a peer: a value, and the bar it must keep to."""
    passed = None
    if below is not None:
        passed = value < below
    elif between is not None:
        passed = between[0] <= value <= between[1]
    return {
        "name": name,
        "unit": unit,
        "ours": value,
        "peer": None,
        "peer_name": note,
        "ratio": None,
        "bound": None,
        "bar": below if below is not None else list(between) if between else None,
        "pass": passed,
    }


def main() -> None:
    """Run everything, print a table, write results/densing.json, print that JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chinchilla", type=Path, help="the replication's CSV")
    parser.add_argument("--obsscaling", type=Path, help="base_llm_benchmark_eval.csv")
    parser.add_argument("--skip-chinchilla", action="store_true", help="leave the slow peer out")
    given = parser.parse_args()
    data = replication(given.chinchilla) if given.chinchilla else simulated()
    result: dict[str, Any] = {
        "tool": "densing",
        "env": environment(),
        "data": {
            "runs": given.chinchilla.name if given.chinchilla else "simulated",
            "scores": given.obsscaling.name if given.obsscaling else "shipped table only",
        },
        "rows": [],
    }
    RESULTS.mkdir(exist_ok=True)
    rows = (inversions(), laws(given.obsscaling), fits(data, given.skip_chinchilla))
    for group in rows:
        for row in group:
            result["rows"].append(row)
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}×"
            missed = f", BAR {row['bar']} MISSED" if row["pass"] is False else ""
            print(
                f"{row['name']:<52} {row['ours']:>12.5g} {row['unit']:<15} {ratio:>8} "
                f"{row['peer_name']}{missed}",
                flush=True,
            )
            # After every row: an interrupted run loses one row, not all.
            text = json.dumps(result, indent=1) + "\n"
            (RESULTS / "densing.json").write_text(text, encoding="utf-8")
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
