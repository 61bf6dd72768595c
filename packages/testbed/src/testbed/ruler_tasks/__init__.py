"""RULER's generated tasks (arXiv 2404.06654), offline: samples, prompts and scores."""

from __future__ import annotations

from .generate import TASKS, ruler
from .sample import RulerSample, ruler_prompt, ruler_score

__all__ = ["TASKS", "RulerSample", "ruler", "ruler_prompt", "ruler_score"]
