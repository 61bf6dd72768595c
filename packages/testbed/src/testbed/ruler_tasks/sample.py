"""What a RULER sample is, how a chat model is asked it, and how its answer is scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerSample:
    """One question with its long context.

    Args:
        task: such as "niah_single_1".
        prompt: instruction, context and question, without a chat template.
        answer_prefix: words that open the model's answer.
        answers: strings that a right answer contains, each of them.
        tokens: length of `ruler_prompt(sample, tokenizer)` in tokens of the tokenizer it was made
            with: prompt, answer prefix and chat template.
        max_new_tokens: RULER's generation budget for the task.
        depths: where in the context each needed statement begins, 0 (start) to 1 (end): one for
            each answer, in order. Empty where the answer is spread over the whole (cwe, fwe).
    """

    task: str
    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    tokens: int
    max_new_tokens: int
    depths: tuple[float, ...]


def ruler_prompt(sample: RulerSample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a model continues: in the tokenizer's chat template if it has one, answer opened.

    The answer prefix stands after the assistant's header, so a chat model goes on with the answer.
    Tokenise with `add_special_tokens=False` if the template begins with the special tokens itself.
    """
    return render(sample.prompt, sample.answer_prefix, tokenizer)


def render(prompt: str, answer_prefix: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`ruler_prompt` for a prompt that is not a sample yet."""
    if tokenizer.chat_template is None:
        return f"{prompt} {answer_prefix}"
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return f"{opened}{answer_prefix}"


def ruler_score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], task: str
) -> float:
    """RULER's score of the generated tasks: mean fraction of the references found, 0 to 1.

    A reference counts if it is a substring of the prediction, whatever the case. RULER prints it
    times 100.

    Args:
        predictions: generated texts, without the prompt.
        references: each sample's `answers`, in the same order.
        task: one of `TASKS`; all are scored alike (RULER's question answering is not, nor here).

    Raises:
        ValueError: an unknown task, no predictions, or lengths that differ.
    """
    from .generate import check_task

    check_task(task)
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            "predictions and references must be as many and at least one; "
            f"got {len(predictions)} and {len(references)}"
        )
    total = 0.0
    for prediction, wanted in zip(predictions, references, strict=True):
        if isinstance(wanted, str) or not wanted:
            raise ValueError(f"references must be sequences of strings; got {wanted!r}")
        # As RULER cleans predictions: control characters become line ends.
        text = re.sub(r"[\x00-\x1f]", "\n", prediction).lower()
        total += sum(reference.lower() in text for reference in wanted) / len(wanted)
    return total / len(predictions)
