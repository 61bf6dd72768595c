"""Densing Law: how many parameters a reference model would need to be as good."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__version__ = importlib.metadata.version("minicpm4-densing")

# Where each public name lives; fitting and tables are imported when one of theirs is asked for.
_HOME = {
    "Benchmark": "benchmarks",
    "Choices": "table_density",
    "ConditionalLoss": "conditional_loss",
    "Density": "capacity_density",
    "FamilyReference": "reference",
    "Forecast": "forecasting",
    "LossLaw": "reference",
    "Model": "tables",
    "ModelTable": "tables",
    "OutOfRange": "capacity_density",
    "Pair": "pairs",
    "Points": "densing_law",
    "Problem": "tables",
    "Reference": "reference",
    "Score": "tables",
    "ScoreLaw": "reference",
    "Trend": "densing_law",
    "combined_doubling": "corollaries",
    "compression": "corollaries",
    "curated_table": "curated",
    "dated_densities": "table_density",
    "density": "capacity_density",
    "effective_from_losses": "capacity_density",
    "effective_parameters": "capacity_density",
    "fit_reference": "reference_models",
    "forecast": "forecasting",
    "halving_time": "corollaries",
    "headline": "sensitivity",
    "leave_one_family_out": "densing_law",
    "measure_conditional_loss": "conditional_loss",
    "pre_post": "breaks",
    "read_csv": "csv_files",
    "read_pairs": "pairs",
    "read_results": "results_files",
    "reference_from_dict": "reference_models",
    "reference_to_dict": "reference_models",
    "runs_table": "conditional_loss",
    "trend": "densing_law",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
