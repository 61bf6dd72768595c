"""What the commands compute and print; the options are in `cli`."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densing.breaks import pre_post
from densing.capacity_density import OutOfRange
from densing.capacity_density import density as one_density
from densing.densing_law import to_date
from densing.estimators import ESTIMATORS
from densing.forecasting import forecast as forecast_one
from densing.outcome import Result, finite, show_plain, show_size
from densing.reference_models import fit_reference
from densing.sensitivity import Headline
from densing.sources import load_columns, load_reference
from densing.table_density import Choices, anchor_reference, dated_densities
from densing.tables import ModelTable

if TYPE_CHECKING:
    from densing.conditional_loss import ConditionalLoss


def density(
    table: ModelTable,
    choices: Choices,
    score: float | None,
    size: float | None,
    reference: Path | None,
) -> Result:
    """One model's density, or a table's."""
    if (score is None) != (size is None):
        raise ValueError("--score and --size belong together: give both, or neither for the table")
    given = load_reference(reference) if reference else None
    if score is not None and size is not None:
        used = given or anchor_reference(table, choices)
        found = one_density(
            score, size, used, questions=None if given else choices.scored_on.questions
        )
        values = {
            "score": score,
            "parameters": size,
            "effective_parameters": found.effective_parameters,
            "density": found.ratio,
            "interval": [finite(found.low), finite(found.high)],
            "out_of_range": found.out_of_range.name.lower() if found.out_of_range else None,
            "extrapolated": found.extrapolated,
        }
        if found.out_of_range is not None:
            where = "below" if found.out_of_range is OutOfRange.BELOW else "above"
            return Result(f"the score {score:.1%} lies {where} the reference's range", values)
        text = f"as good as a reference of {show_size(found.effective_parameters)}: density "
        text += f"{found.ratio:.3g}"
        if found.low is not None:
            text += f" (95% interval {found.low:.2g} to {show_plain(found.high)})"
        if found.extrapolated:
            text += "; outside the sizes of the reference's own models"
        return Result(text, values)
    all_found = dated_densities(table, choices, given)
    rows = sorted(all_found.placed, key=lambda p: -(p.density.ratio or 0))
    lines = [
        f"{choices.scored_on.name}, {choices.basis} parameters, reference "
        f"{all_found.reference_name}",
        f"{'model':<34} {'released':<11} {'parameters':>10} {'score':>7} {'density':>8}",
    ]
    for p in rows:
        d = p.density
        interval = "" if d.low is None else f"  {d.low:.2g} – {show_plain(d.high)}"
        lines.append(
            f"{p.model.name:<34} {p.model.released!s:<11} {show_size(d.parameters):>10} "
            f"{p.score:>7.1%} {d.ratio:>8.3g}{interval}{' *' if d.extrapolated else ''}"
        )
    lines.append("* outside the sizes of the reference's own models")
    lines.append(f"left out: {reasons(all_found.left_out)}")
    return Result(
        "\n".join(lines),
        {
            "models": [{"name": p.model.name, "density": p.density.ratio} for p in rows],
            "left_out": [list(pair) for pair in all_found.left_out],
        },
    )


def break_on(
    table: ModelTable, choices: Choices, estimator: str, on: date, resamples: int, seed: int
) -> tuple[str, dict[str, Any]]:
    """Growth before and after a date."""
    points = dated_densities(table, choices).points
    found = pre_post(points, on, estimator, resamples=resamples, seed=seed)
    lines = [
        f"before {on}: doubles in {found.before.doubling_days:.0f} days "
        f"({len(found.before.points)} points); from then on in {found.after.doubling_days:.0f} "
        f"({len(found.after.points)} points); slopes {found.ratio:.2f} times "
        f"({found.low:.2f} to {show_plain(found.high)})",
        *(f"warning: {w}" for w in found.warnings),
    ]
    if found.carried:
        low, high = found.carried.doubling_interval
        lines.insert(
            1,
            f"  counted on from the record before {on}, instead of anew: "
            f"{found.carried.doubling_days:.0f} days ({_days(low)} to {_days(high)}, "
            f"{len(found.carried.points)} points)",
        )
    return "\n".join(lines), {
        "on": str(on),
        "before": found.before.to_dict(),
        "after": found.after.to_dict(),
        "ratio": found.ratio,
        "interval": [found.low, finite(found.high)],
        "carried": found.carried and found.carried.to_dict(),
        "warnings": list(found.warnings),
    }


def _days(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "∞"


def forecast(
    table: ModelTable, choices: Choices, score: float, by: date, resamples: int, seed: int
) -> Result:
    """The forecast by every estimator: the spread is part of the answer."""
    found = dated_densities(table, choices)
    newest = to_date(found.points.days.max(), found.points.zero) if found.points.names else by
    lines = [
        f"{choices.scored_on.name} {score:.1%} by {by} ({max(0, (by - newest).days)} days after "
        "the newest model here), parameters that the densest model needs:"
    ]
    rows = []
    for name in ESTIMATORS:
        one = forecast_one(
            score, by, found.points, found.reference, estimator=name, resamples=resamples, seed=seed
        )
        if isinstance(one, OutOfRange):
            where = one.name.lower()
            return Result(
                f"the score {score:.1%} lies {where} the reference's range: no forecast",
                {"score": score, "by": str(by), "out_of_range": where},
            )
        lines.append(
            f"  {name:<16} {show_size(one.parameters):>9}   {one.level:.0%} interval "
            f"{show_size(one.low)} to {show_size(one.high)}"
        )
        rows.append(
            {
                "estimator": name,
                "parameters": one.parameters,
                "interval": [one.low, finite(one.high)],
            }
        )
    lines.append("a trend does not say whether it goes on")
    return Result("\n".join(lines), {"score": score, "by": str(by), "forecasts": rows})


def report(
    table: ModelTable,
    found: Headline,
    runs: Path | None,
    scores: Path | None,
    chance: float | None,
    seed: int,
    command: str,
) -> str:
    """The HTML page."""
    from densing.reporting.page import Ladder
    from densing.reporting.page import report as page

    if (runs is None) != (scores is None):
        raise ValueError("--runs and --scores belong together: the two laws need both")
    ladder = None
    if runs is not None and scores is not None:
        losses = load_columns(runs, ("parameters", "tokens", "loss"))
        points = load_columns(scores, ("loss", "score"))
        reference = fit_reference(losses, points, chance=chance, seed=seed, draws=200)
        held = len(points["loss"]) // 4
        ladder = Ladder(reference, losses, points, held)  # type: ignore[arg-type]
    return page(table, found, ladder=ladder, command=command)


def loss(
    model: Path,
    pairs: Path,
    out: Path | None,
    batch_size: int,
    max_length: int | None,
    dtype: str,
    device: str,
    register: str | None,
    progress: Callable[[int, int], None],
) -> ConditionalLoss:
    """Load a transformers folder, whose architecture `register` may bring, and measure it."""
    from densing.conditional_loss import measure_conditional_loss
    from densing.pairs import read_pairs

    items = read_pairs(pairs)
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"{model} is no transformers folder: it has no config.json")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"measuring needs {error.name}: pip install './packages/densing[hf]'"
        ) from error
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ValueError(f"--dtype {dtype!r}: expected one of {', '.join(kinds)}")
    if register is not None:
        try:
            importlib.import_module(register).register()
        except ImportError as error:
            raise ImportError(f"--register {register}: {error}; install it") from error
        except AttributeError:
            raise ValueError(f"--register {register}: the module has no register()") from None
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    net = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=kinds[dtype], local_files_only=True
    )
    return measure_conditional_loss(
        net.eval().to(device), tokenizer, items, batch_size=batch_size, max_length=max_length,
        out=out, progress=progress,
    )  # fmt: skip


def reasons(left_out: Sequence[tuple[str, str]]) -> str:
    """How many models were left out for which kind of reason."""
    kinds = Counter(reason.split(",")[0].split("(")[0].strip() for _, reason in left_out)
    grouped: Counter[str] = Counter()
    for reason, count in kinds.items():
        for start in ("score", "released on"):
            if reason.startswith(start):
                reason = {"score": "score too near chance", "released on": "outside the dates"}[
                    start
                ]
        grouped[reason] += count
    return ", ".join(f"{count} {reason}" for reason, count in grouped.most_common()) or "none"
