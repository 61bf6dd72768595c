"""Tables of models: what is read from files, and every doubt about it, named.

Nothing is dropped in silence: a value that cannot be used is left out *and* becomes a `Problem`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        value: a fraction in 0..1. shots: in the prompt, None if unknown.
        source: where it was read, a title and an address.
    """

    value: float
    shots: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Model:
    """A model and its scores.

    Attributes:
        name, family: as published. parameters: total; None if unknown.
        active_parameters: used for one token, for mixtures of experts; None if not known.
        tokens: of pretraining. released: date. parent: the model it was pruned or distilled from.
        scores: benchmark -> score. aliases: other names, such as a repository's.
    """

    name: str
    family: str = ""
    parameters: float | None = None
    active_parameters: float | None = None
    tokens: float | None = None
    released: date | None = None
    parent: str | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether it is a mixture of experts, by its numbers or by its name."""
        if self.active_parameters and self.parameters:
            return self.active_parameters < 0.9 * self.parameters
        return is_sparse_name(self.name)


@dataclass(frozen=True)
class Problem:
    """Something about the data that a reader must know.

    Attributes:
        kind: one word, such as "duplicate", "scale", "chance", "date", "active", "suspicious".
        model: whose, or empty for the whole table. message: what, and what was done about it.
        excluded: whether a value or a model was left out because of it.
    """

    kind: str
    model: str
    message: str
    excluded: bool = False

    def __str__(self) -> str:
        """One line."""
        who = f"{self.model}: " if self.model else ""
        return f"[{self.kind}] {who}{self.message}{' (left out)' if self.excluded else ''}"


@dataclass(frozen=True)
class ModelTable:
    """Models, and what is doubtful about them.

    Attributes:
        models: in the file's order. source: the file or table. problems: see `Problem`.
        scales: benchmark -> "percent", "fraction" or "mixed", as detected.
    """

    models: tuple[Model, ...]
    source: str
    problems: tuple[Problem, ...] = ()
    scales: dict[str, str] = field(default_factory=dict)

    def benchmarks(self) -> dict[str, int]:
        """Benchmark -> models that have a score on it, most first."""
        counts: dict[str, int] = {}
        for model in self.models:
            for name in model.scores:
                counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def family(self, name: str) -> list[Model]:
        """Models of a family; ValueError lists the families there are."""
        found = [m for m in self.models if plain(m.family) == plain(name)]
        if not found:
            known = ", ".join(sorted({m.family for m in self.models if m.family}))
            raise ValueError(f"no family {name!r} in {self.source}: it has {known or 'none'}")
        return found

    def joined(self, other: ModelTable, source: str | None = None) -> ModelTable:
        """What is missing here (dates, sizes, families) filled from a table with the same models.

        Values here win. A model is found by its name or an alias, compared without case and
        punctuation. Models that `other` does not know are named in a problem.
        """
        index: dict[str, Model] = {}
        for model in other.models:
            for name in (model.name, *model.aliases):
                index.setdefault(plain(name), model)
        models, unknown = [], []
        for model in self.models:
            match = next(
                (index[plain(n)] for n in (model.name, *model.aliases) if plain(n) in index), None
            )
            if match is None:
                unknown.append(model.name)
                models.append(model)
                continue
            models.append(
                replace(
                    model,
                    family=model.family or match.family,
                    parameters=model.parameters or match.parameters,
                    active_parameters=model.active_parameters or match.active_parameters,
                    tokens=model.tokens or match.tokens,
                    released=model.released or match.released,
                    parent=model.parent or match.parent,
                    scores={**match.scores, **model.scores} if source else model.scores,
                )
            )
        problems = list(self.problems)
        if unknown:
            names = ", ".join(unknown)
            text = f"{len(unknown)} of {len(models)} models are not in {other.source}: {names}"
            problems.append(Problem("unknown", "", text))
        return replace(
            self, models=tuple(models), problems=tuple(problems), source=source or self.source
        )


def plain(name: str) -> str:
    """A name without organisation, case and punctuation, and without a trailing "hf"."""
    return re.sub(r"[^a-z0-9.]", "", re.sub(r"-hf$", "", name.lower().split("/")[-1].strip()))


_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)\s?x\s?)?(\d+(?:[._]\d+)?)\s?([bm])(?![a-z0-9])", re.I)
_ACTIVE = re.compile(r"(?<![a-z0-9])a(\d+(?:\.\d+)?)b(?![a-z0-9])", re.I)
_SPARSE = re.compile(r"\d+x\d+(\.\d+)?b|moe|mixtral|jamba|deepseek-?(coder-)?v[23]", re.I)


def is_sparse_name(name: str) -> bool:
    """Whether a name says "mixture of experts" (8x7B, A14B, MoE, known families)."""
    return bool(_SPARSE.search(name) or _ACTIVE.search(name))


def size_in_name(name: str) -> float | None:
    """Parameters that a name speaks of (7b, 350M, 8x22B), None where it speaks of none."""
    found = _SIZE.search(name)
    if not found:
        return None
    size = float(found[2].replace("_", ".")) * (1e9 if found[3].lower() == "b" else 1e6)
    return size * float(found[1] or 1)


def show(problems: Iterable[Problem]) -> str:
    """Problems as lines, grouped by kind."""
    return "\n".join(str(p) for p in sorted(problems, key=lambda p: p.kind))


def file_name(path: str | Path) -> str:
    """What a file is called in messages: its last two parts."""
    return "/".join(Path(path).parts[-2:])
