"""How good an eye is: overlap with the truly best entries, and what the next words cost by budget.

Both treat trained heads and training-free scorers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from locret.cache import LocretCache
from locret.config import LocretConfig
from locret.context import locret
from locret.generation import prefill
from locret.labels import collect, overlap
from locret.scorers import as_scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from locret.heads import RetainingHeads
    from locret.scoring import Scorer
    from locret.training import Example

Progress = Callable[[str, float], None]
Eyes = Mapping[str, "RetainingHeads | Scorer | str"]


def sizes(budget: int, chunk: int, **more: int) -> LocretConfig:
    """A configuration for small budgets: a quarter of it protects the newest, 4 sinks."""
    if budget < 8:
        raise ValueError(f"a budget of {budget} entries leaves no choice: give at least 8")
    return LocretConfig(
        **{
            "budget": budget, "chunk": chunk, "stabilisers": budget // 4, "sinks": 4,
            "local": min(16, chunk), **more,
        }
    )  # fmt: skip


@torch.no_grad()
def overlaps(
    model: PreTrainedModel, eyes: Eyes, examples: Sequence[Example], *, share: float = 0.1,
    labels: str = "attention", progress: Progress = lambda text, done: None,
) -> dict[str, float]:  # fmt: skip
    """Mean over texts, layers and heads of the overlap with the best `share`, for each scorer.

    A scorer sees the prompt in one piece and never the answer, whose queries make the labels, of
    the kind that `locret.labels` says.

    Raises:
        ValueError: no texts.
    """
    if not examples:
        raise ValueError("there is no text to measure on")
    found: dict[str, list[float]] = {name: [] for name in eyes}
    for at, example in enumerate(examples):
        progress(f"overlap on text {at + 1} of {len(examples)}", at / len(examples))
        truths: list[Tensor] = []
        ids = example.ids[None].to(model.device)
        collect(
            model, ids, example.answer, lambda layer, x, y, to=truths: to.append(y),
            query=example.query, labels=labels,
        )  # fmt: skip
        prompt, asked = ids[:, : ids.shape[1] - example.answer], example.query
        room = prompt.shape[1]
        whole = LocretConfig(budget=room, chunk=room, stabilisers=0, local=0)
        for name, eye in eyes.items():
            scorer = as_scorer(eye, model)
            cache = prefill(model, scorer, prompt, whole)
            for layer, truth in zip(cache.layers, truths, strict=True):
                scorer.rescore(layer)
                found[name].append(overlap(layer.scores[..., asked:].float(), truth, share))
    return {name: sum(values) / len(values) for name, values in found.items()}


@torch.no_grad()
def answer_nll(
    model: PreTrainedModel, eye: RetainingHeads | Scorer | str | None, context: Tensor,
    more: Tensor, answer: Tensor, config: LocretConfig,
) -> float:  # fmt: skip
    """Mean negative log-likelihood of `answer`, nats per token, after a compressed context.

    Args:
        model: a transformers decoder.
        eye: heads, a scorer or its name; None: the model with its full cache.
        context: int64 `[n]`, read in chunks and compressed.
        more: int64 `[m]`, read after it and not scored, such as a question; may be empty.
        answer: int64 `[a]`.
        config: sizes.

    Raises:
        ValueError: no context or no answer.
    """
    if not len(context) or not len(answer):
        raise ValueError(f"context {len(context)} and answer {len(answer)} need a token each")
    rest = torch.cat([more, answer])
    if not len(more):  # the first answer token is foretold by the context's last
        rest, context = torch.cat([context[-1:], answer]), context[:-1]
    fed = rest[:-1][None].to(model.device)
    if eye is None:
        whole = torch.cat([context, rest[:-1]])[None].to(model.device)
        logits = model(input_ids=whole, logits_to_keep=len(answer), use_cache=False).logits[0]
    else:
        cache = LocretCache(config)
        if len(context):
            cache = prefill(model, eye, context[None].to(model.device), config)
        with locret(model, eye, config):
            logits = model(input_ids=fed, past_key_values=cache, logits_to_keep=len(answer)).logits[
                0
            ]
    return cross_entropy(logits.float(), answer.to(logits.device)).item()


def nll_by_budget(
    model: PreTrainedModel, eyes: Eyes, examples: Sequence[Example], budgets: Sequence[float],
    *, chunk: int = 256, progress: Progress = lambda text, done: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Mean NLL of the texts' answers for each scorer and budget, and of the full cache.

    Args:
        model: a transformers decoder.
        eyes: scorers by name.
        examples: texts, whose last `answer` tokens are foretold from the compressed rest.
        budgets: shares of the prompt that are kept, each in (0, 1].
        chunk: tokens read at once.
        progress: called with a line and the share done.

    Returns:
        nats per token by name, in the order of `budgets`; "full" has the same number throughout.
    """
    if not examples or not all(0 < b <= 1 for b in budgets):
        raise ValueError(f"need texts, and budgets between 0 and 1, got {list(budgets)}")
    found = {name: [0.0] * len(budgets) for name in ("full", *eyes)}
    for at, example in enumerate(examples):
        progress(f"NLL on text {at + 1} of {len(examples)}", at / len(examples))
        n = len(example.ids) - example.answer
        prompt, answer = example.ids[:n], example.ids[n:]
        dense = answer_nll(model, None, prompt, prompt[:0], answer, sizes(8, chunk))
        for b, share in enumerate(budgets):
            config = sizes(max(8, round(share * n)), chunk)
            # The answer alone may not fill the cache, or it would evict what is measured.
            # What is asked stays, where the text begins with it.
            config = replace(
                config, chunk=max(chunk, example.answer), sinks=max(config.sinks, example.query)
            )
            found["full"][b] += dense / len(examples)
            for name, eye in eyes.items():
                nll = answer_nll(model, eye, prompt, prompt[:0], answer, config)
                found[name][b] += nll / len(examples)
    return found
