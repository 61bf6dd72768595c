"""Train the heads of a model: labels once, ridge in the same pass, MLPs from the ridge. §3.2.

A work folder holds each batch's head inputs and labels as they are made, and each layer's MLP as it
is finished, so a killed training goes on where it was. Layers do not depend on each other, so an
MLP's training needs one layer's inputs in memory and never the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from locret._files import atomic_path, write_json
from locret.heads import RetainingHeads
from locret.labels import KINDS, collect, overlap
from locret.retaining_head import LOSSES, SMOOTHING, RetainingHead
from locret.ridge import RidgeSums, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How heads are trained.

    Args:
        hidden: d_R; 0 stops at the ridge.
        input: "hidden" or "qkv".
        labels: "attention", or the paper's "scores": see `locret.labels`.
        epochs: passes of the MLP over the labels.
        lr: AdamW's peak learning rate (paper: 5e-4, for far more steps), warmed up over a
            twentieth of the steps, then falling to zero.
        loss: "paper" (Eq. 5), or "top", which asks for the order of the best; see `top_loss`.
        smoothing: weight of the neighbour term.
        ridge: strength of the ridge penalty.
        held_out: share of the texts that no head learns from and that the overlap is measured on.
        seed: of the initial weights and the order of texts.
    """

    hidden: int = 256
    input: str = "hidden"
    labels: str = "attention"
    epochs: int = 4
    lr: float = 3e-3
    loss: str = "top"
    smoothing: float = SMOOTHING
    ridge: float = 1e-3
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        if self.hidden < 0 or self.epochs < 1 or self.lr <= 0 or self.ridge <= 0:
            raise ValueError(
                "hidden must be ≥ 0, epochs ≥ 1, lr and ridge > 0; got "
                f"{self.hidden}, {self.epochs}, {self.lr}, {self.ridge}"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.labels not in KINDS:
            raise ValueError(f"labels must be one of {', '.join(KINDS)}, got {self.labels!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")


@dataclass(frozen=True)
class Example:
    """One text: ids int64 `[T]`, and how many tokens at its end are the answer.

    For Locret-Q the text is query, context, query, answer: the first `query` tokens are not
    labelled, and the second copy of them belongs to `answer`, whose rows make the labels.
    """

    ids: Tensor
    answer: int
    query: int = 0


def train(
    model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig, work: str | Path,
    progress: Progress = lambda text, done: None,
) -> tuple[RetainingHeads, dict[str, Any]]:  # fmt: skip
    """Heads for `model`, and how well they rank unseen text.

    Args:
        model: a transformers decoder, in eval mode; it is not changed.
        examples: texts in their order; the last `held_out` of them are only measured on.
        config: sizes and strengths.
        work: folder of what is finished; the same call with it goes on there.
        progress: called with a line and the share done.

    Returns:
        heads; and `{"overlap": {"ridge": …, "mlp": …}, "tokens": …, …}` on the held-out texts.

    Raises:
        ValueError: fewer than two texts, or a work folder of another training.
    """
    if len(examples) < 2:
        raise ValueError(f"training needs at least two texts, one to measure on; got {examples!r}")
    aware = bool(examples[0].query)
    if any(bool(example.query) != aware for example in examples):
        raise ValueError("texts with and without a query do not mix: heads are trained for one")
    work = Path(work)
    _claim(work, model, examples, config)
    held = max(1, round(config.held_out * len(examples)))
    learn, test = range(len(examples) - held), range(len(examples) - held, len(examples))
    ridge = RetainingHeads.for_model(model, hidden=0, input=config.input, query_aware=aware)
    sums = [RidgeSums(ridge.config.inputs, ridge.config.kv_heads) for _ in ridge.layers]
    for at in (*learn, *test):
        progress(f"labels of text {at + 1} of {len(examples)}", 0.6 * at / len(examples))
        path = work / f"labels-{at:05d}.safetensors"
        fresh = None if path.exists() else _label(model, examples[at], path, config)
        if at in learn:
            for layer, total in enumerate(sums):
                total.add(*(fresh[layer] if fresh else _read(path, layer)))
    for layer, total in enumerate(sums):
        fill(ridge, layer, total, config.ridge)
    paths = [work / f"labels-{at:05d}.safetensors" for at in range(len(examples))]
    facts: dict[str, Any] = {
        "tokens": sum(len(e.ids) - e.answer - e.query for e in examples[: len(learn)]),
        "texts": len(learn),
        "overlap": {"ridge": _overlap(ridge, [paths[at] for at in test])},
        "train": asdict(config),
    }
    if not config.hidden:
        return ridge.eval(), facts
    heads = RetainingHeads.for_model(
        model, hidden=config.hidden, input=config.input, query_aware=aware
    )
    for layer in range(len(heads.layers)):
        progress(f"head of layer {layer}", 0.6 + 0.4 * layer / len(heads.layers))
        heads.layers[layer] = _fit(
            ridge.layers[layer], layer, paths, len(learn), config, work, heads.layers[layer]
        )
    facts["overlap"]["mlp"] = _overlap(heads, [paths[at] for at in test])
    return heads.eval(), facts


def _fit(
    linear: RetainingHead, layer: int, paths: list[Path], learn: int, config: TrainConfig,
    work: Path, head: RetainingHead,
) -> RetainingHead:  # fmt: skip
    """One layer's MLP, from the ridge; kept in the work folder when it is done."""
    from safetensors.torch import load_file, save_file

    done = work / f"head-{layer:03d}.safetensors"
    if done.exists():
        head.load_state_dict(load_file(done))
        return head
    texts = [_read(path, layer) for path in paths[:learn]]
    # Inputs differ by orders of magnitude between dimensions: Adam sees them all alike, and the
    # scales are folded into W₁ afterwards.
    every = torch.cat([x[0] for x, _ in texts])
    mean, scale = every.mean(0), every.std(0).clamp(min=1e-6)
    del every
    texts = [((x - mean) / scale, y) for x, y in texts]
    generator = torch.Generator().manual_seed(config.seed * 1009 + layer)
    with torch.no_grad():
        for weight in (head.fc1.weight, head.fc2.weight):
            bound = weight.shape[1] ** -0.5
            weight.copy_(torch.rand(weight.shape, generator=generator) * 2 * bound - bound)
        head.fc1.bias.zero_()
        scaled = RetainingHead(linear.fc2.in_features, linear.fc2.out_features, 0, bias=True)
        scaled.fc2.weight.copy_(linear.fc2.weight * scale)
        scaled.fc2.bias.copy_(linear.fc2.bias + linear.fc2.weight @ mean)
    head.start_from(scaled)
    steps = config.epochs * learn
    optimiser = torch.optim.AdamW(head.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    for _ in range(config.epochs):
        for at in torch.randperm(learn, generator=generator).tolist():
            x, y = texts[at]
            with torch.enable_grad():
                loss = LOSSES[config.loss](head(x), y, config.smoothing)
                optimiser.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_value_(head.parameters(), 0.5)  # as the paper's training does
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        head.fc1.weight.div_(scale)
        head.fc1.bias.sub_(head.fc1.weight @ mean)
    with atomic_path(done) as path:
        save_file({k: v.contiguous() for k, v in head.state_dict().items()}, path)
    return head


def _label(
    model: PreTrainedModel, example: Example, path: Path, config: TrainConfig
) -> list[tuple[Tensor, Tensor]]:
    """Make one text's labels and write them, whole or not at all."""
    from safetensors.torch import save_file

    found: list[tuple[Tensor, Tensor]] = []
    ids = example.ids[None].to(model.device)
    collect(
        model, ids, example.answer,
        lambda layer, x, y: found.append((x.to(torch.bfloat16).cpu(), y.cpu())),
        input=config.input, query=example.query, labels=config.labels,
    )  # fmt: skip
    tensors = {f"x{i}": x for i, (x, _) in enumerate(found)}
    tensors |= {f"y{i}": y.contiguous() for i, (_, y) in enumerate(found)}
    with atomic_path(path) as target:
        save_file(tensors, target)
    return [(x.float(), y) for x, y in found]


def _read(path: Path, layer: int) -> tuple[Tensor, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(f"x{layer}").float(), file.get_tensor(f"y{layer}")


@torch.no_grad()
def _overlap(heads: RetainingHeads, paths: Sequence[Path]) -> float:
    """Mean over texts, layers and heads of the top-10 % overlap."""
    found = [
        overlap(head(x), y)
        for path in paths
        for layer, head in enumerate(heads.layers)
        for x, y in [_read(path, layer)]
    ]
    return sum(found) / len(found)


def _claim(
    work: Path, model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig
) -> None:
    """Write what the folder's files belong to, or refuse a folder that belongs to something else.

    Labels depend on model, texts, input and their kind; the heads on everything, so other settings
    start them again and keep the labels.
    """
    digest = hashlib.sha256(repr(sorted(model.config.to_dict().items(), key=str)).encode())
    for weight in list(model.parameters())[-4:]:
        digest.update(weight.detach().float().cpu().numpy().tobytes()[: 1 << 20])
    for example in examples:
        digest.update(example.ids.numpy().tobytes() + f"{example.answer} {example.query}".encode())
    mine = {
        "labels": digest.hexdigest() + config.input + config.labels,
        "train": asdict(config),
    }
    path = work / "work.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs["labels"] != mine["labels"]:
            raise ValueError(
                f"{work} holds labels of another model, other texts, another input or of another "
                "kind: delete it, or choose another --work"
            )
        if theirs["train"] != mine["train"]:
            for head in work.glob("head-*.safetensors"):
                head.unlink()
    write_json(path, mine)
