"""Benchmarks: what guessing gives, how many questions there are, and what else they are called."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: as in tables here.
        chance: expected score of guessing, a fraction.
        questions: in the usual test set; gives a score's sampling error.
        aliases: other names in results files and headers, compared without case and punctuation.
    """

    name: str
    chance: float
    questions: int
    aliases: tuple[str, ...] = ()


BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark("MMLU", 0.25, 14042, ("mmlu", "hendrycksTest")),
        # Free-form answers with chain of thought: guessing is not an option that pays.
        Benchmark("BBH", 0.0, 6511, ("bbh", "bbh_cot_fewshot", "big_bench_hard")),
        Benchmark("MATH", 0.0, 5000, ("math", "hendrycks_math", "minerva_math", "math_4shot")),
        Benchmark("GSM8K", 0.0, 1319, ("gsm8k", "gsm8k_cot")),
        Benchmark("HumanEval", 0.0, 164, ("humaneval", "human_eval")),
        Benchmark("MBPP", 0.0, 500, ("mbpp",)),
        Benchmark("ARC-C", 0.25, 1172, ("arc_challenge", "arc_c", "arc:challenge")),
        Benchmark("HellaSwag", 0.25, 10042, ("hellaswag",)),
        Benchmark("MMLU-Pro", 0.1, 12032, ("mmlu_pro", "leaderboard_mmlu_pro")),
        Benchmark("GPQA", 0.25, 448, ("gpqa", "leaderboard_gpqa")),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name or alias.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    found = match_benchmark(name)
    if found is None:
        raise ValueError(
            f"unknown benchmark {name!r}: expected one of {', '.join(BENCHMARKS)} "
            "(another one: densing.Benchmark(name, chance, questions))"
        )
    return found


def match_benchmark(name: str) -> Benchmark | None:
    """The benchmark that a task or column is called after, or None."""
    plain = _plain(name)
    for benchmark in BENCHMARKS.values():
        if plain in {_plain(benchmark.name), *map(_plain, benchmark.aliases)}:
            return benchmark
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
