"""Damaged files: every mutation loads or ends in ValueError or FileNotFoundError, fast.

`make fuzz` does the same tens of thousands of times, in a process that may crash.
"""

from __future__ import annotations

import cpmcu_fuzzing
import pytest

EXAMPLES = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "models"
    cpmcu_fuzzing.make_models(folder)
    return folder


@pytest.mark.parametrize(
    "kind", ["plain", "quantised", "gguf/q4.gguf", "gguf/q8.gguf", "gguf/q4_1.gguf"]
)
def test_undamaged_models_work(models, kind):
    assert cpmcu_fuzzing.survives(models / kind)


@pytest.mark.parametrize("target", list(cpmcu_fuzzing.TARGETS))
def test_damaged_files(models, tmp_path, target):
    seeds = range(EXAMPLES)
    outcomes = [
        cpmcu_fuzzing.survives(path)
        for _, path, _ in cpmcu_fuzzing.examples(models, tmp_path, target, seeds)
    ]
    # Both kinds were met, so the faults do reach the checks.
    assert 0 < sum(outcomes) < EXAMPLES, target
