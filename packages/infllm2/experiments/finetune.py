"""Fine-tune a dense model briefly so that it loses less under sparse attention.

SmolLM2-135M-Instruct, two runs on the same sequences: `sparse` trains with InfLLM v2's attention,
`dense` with dense attention. Both are then measured under both attentions. What `dense` gains under
sparse attention is the effect of the data; what `sparse` gains beyond it is the effect of training
sparse. One sequence in four is a long encyclopaedia article (every token is learnt), the others are
RULER needles with all four keys asked for (only the answers are learnt). Needles and articles of
the measurement are others; the essays around the needles are the same few, here as in all of RULER.
"""

from __future__ import annotations

import gc
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ruler import ask, questions
from shared import HERE, QUICK, Cells, Later, budget, dense, long_texts, table
from torch import Tensor

from infllm2 import InfLLMv2Config, sparse
from infllm2._cli import run

CONFIG = budget(256, 4)
TASK = "niah_multikey_1"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Settings:
    """Sizes of the run; a result file holds those that it was made with."""

    models: tuple[str, ...] = ("untrained", "sparse", "dense")
    steps: int = 96
    length: int = 2048
    lr: float = 2e-4
    warmup: int = 8
    clip: float = 1.0
    articles: int = 6  # pieces of held-out articles
    texts: tuple[tuple[int, int], ...] = ((2048, 3), (4096, 2))  # held-out needles: length, number
    seed: int = 1  # of the training needles; the measured ones have 0


def attention(model: Any, mode: str) -> Any:
    """The model with one of both attentions."""
    return sparse(model, CONFIG if mode == "sparse" else dense(CONFIG))


def conversation(sample: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """One needle text with all its keys asked for in turn; ids `[1, n]`, targets (−100: none)."""
    ids: list[Tensor] = []
    targets: list[Tensor] = []
    shared = 0
    for at, question in enumerate(questions(sample, tokenizer)):
        prompt = question.prompt
        if at == 0:
            first = prompt
        else:
            # Where the questions part, go back to the line break before "What is …".
            shared = shared or _turn(first, prompt, tokenizer)
            end = tokenizer(".<|im_end|>\n<|im_start|>user", add_special_tokens=False)["input_ids"]
            prompt = torch.cat([torch.tensor(end), prompt[shared:]])
        ids += [prompt, question.gold]
        targets += [torch.full_like(prompt, -100), question.gold]
    return torch.cat(ids)[None], torch.cat(targets)[None]


def _turn(first: Tensor, second: Tensor, tokenizer: Any) -> int:
    """Index at which the last question begins in both prompts."""
    width = min(len(first), len(second))
    parts = int((first[:width] == second[:width]).long().cumprod(0).sum())
    opening = tokenizer("\nWhat", add_special_tokens=False)["input_ids"]
    for at in range(parts - len(opening), 0, -1):
        if first[at : at + len(opening)].tolist() == opening:
            return at
    raise ValueError("the prompt holds no question: expected a line that begins with What")


def sequences(settings: Settings, tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Ids and targets of each step: the same for both runs."""
    import testbed

    samples = iter(testbed.ruler(TASK, settings.length, settings.steps, settings.seed, tokenizer))
    articles = long_texts("wikipedia", "train", settings.length, tokenizer)
    order = torch.randperm(len(articles), generator=torch.Generator().manual_seed(settings.seed))
    found: list[tuple[Tensor, Tensor]] = []
    for step in range(settings.steps):
        if step % 4:
            found.append(conversation(next(samples), tokenizer))
        else:
            ids = articles[int(order[step // 4 % len(order)])]
            found.append((ids, ids))
    return found


def rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then linear decay to zero."""
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup)
    return settings.lr * min((step + 1) / settings.warmup, left)


def tune(mode: str, settings: Settings, cells: Cells, work: Path) -> dict[str, Any]:
    """Train, save the weights as `work/<mode>.safetensors`; a run out of time goes on later."""
    import testbed
    from minicpm4 import checkpoint
    from minicpm4.checkpoint import save_tensors, weights

    torch.manual_seed(0)
    model, tokenizer = testbed.smollm2()
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    folder = work / mode
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**asdict(settings), "texts": None, "articles": None, "models": None}
    step = checkpoint.resume(model, optimizer, folder, 0, facts)
    history = checkpoint.cut_log(folder / "log.jsonl", step)
    data = sequences(settings, tokenizer)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log, attention(model, mode):
        while step < settings.steps:
            if cells.late():
                checkpoint.save(model, optimizer, folder, step, facts)
                raise Later
            loss = update(model, optimizer, *data[step], rate(step, settings), settings.clip)
            step += 1
            history.append({"step": step, "loss": round(loss, 4)})
            log.write(f'{{"step": {step}, "loss": {loss:.4f}}}\n')
            log.flush()
            print(f"  {mode}: step {step}/{settings.steps}, loss {loss:.3f}", flush=True)
    save_tensors(work / f"{mode}.safetensors", weights(model))
    shutil.rmtree(folder)
    return {"loss": [row["loss"] for row in history]}


def update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    targets: Tensor,
    lr: float,
    clip: float,
) -> float:
    """One step on one sequence; the mean loss of its targets."""
    import testbed

    wanted = targets[0, 1:]
    learnt = (wanted != -100).nonzero()[:, 0]
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=testbed.quick_dtype() == torch.bfloat16):
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        logits = model.lm_head(hidden[learnt])
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted[learnt])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def measure(trained: str, mode: str, settings: Settings, work: Path) -> dict[str, Any]:
    """Held-out articles (NLL) and needles (answers right, NLL) of one model, one attention."""
    import testbed
    from minicpm4.checkpoint import load_weights

    gc.collect()
    model, tokenizer = testbed.smollm2()
    if trained != "untrained":
        load_weights(model, work / f"{trained}.safetensors")
    model = model.to(testbed.quick_dtype())
    model.tokenizer = tokenizer
    articles = long_texts("wikipedia", "test", settings.length, tokenizer)
    chosen = torch.linspace(0, len(articles) - 1, settings.articles).long().unique().tolist()
    result: dict[str, Any] = {"articles": []}
    with attention(model, mode):
        for at in chosen:
            ids = articles[at]
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            result["articles"].append(round(nll.item(), 4))
        for length, count in settings.texts:
            found: dict[str, list[Any]] = {"right": [], "nll": []}
            for sample in testbed.ruler(TASK, length, count, 0, tokenizer):
                config: InfLLMv2Config = CONFIG if mode == "sparse" else dense(CONFIG)
                answer = ask(model, config, questions(sample, tokenizer))
                for name in found:
                    found[name] += answer[name]
            result[f"needles {length}"] = found
    return result


def plan(settings: Settings, cells: Cells, work: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and computations of all cells; each model is measured as soon as there is one."""
    for trained in settings.models:
        if trained != "untrained":
            yield f"train {trained}", lambda t=trained: tune(t, settings, cells, work)
        for mode in ("dense", "sparse"):
            args = (trained, mode, settings, work)
            yield f"{trained} | {mode}", lambda args=args: measure(*args)


def summary(cells: dict[str, Any], settings: Settings) -> dict[str, dict[str, Any]]:
    """Means by model and attention."""
    facts = {}
    for name, cell in cells.items():
        if " | " not in name:
            continue
        facts[name] = {"articles": round(statistics.mean(cell["articles"]), 4)}
        for length, _ in settings.texts:
            found = cell[f"needles {length}"]
            facts[name][f"needles {length}"] = {
                "right": sum(found["right"]),
                "of": len(found["right"]),
                "nll": round(statistics.mean(found["nll"]), 3),
            }
    return facts


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Smoke run: one short step, to runs/.")] = False,
    out: Annotated[Path | None, typer.Option(help="Holds results/; beside this script.")] = None,
    work: Annotated[
        Path, typer.Option(help="Weights and checkpoints: 1 GB when done, 5 GB meanwhile.")
    ] = Path("runs/infllm2-finetune"),
    minutes: Annotated[
        float, typer.Option(help="Start no step or cell later than this; run again to go on.")
    ] = 1e9,
) -> None:
    """A short fine-tune of SmolLM2-135M-Instruct under sparse attention (window 256 + 4 blocks),
    and the same under dense attention as a control. Each model is measured under both: loss of
    held-out articles in nats per token, RULER answers right and their loss. Goes on where a killed
    run stopped. Needs the minicpm4 package, for its checkpoints."""
    settings = Settings()
    if quick:
        settings = Settings(
            models=("untrained", "sparse"), steps=1, length=640, warmup=1, articles=1,
            texts=((640, 1),),
        )  # fmt: skip
        work = work / "quick"
    cells = Cells("finetune", out or (QUICK if quick else HERE), asdict(settings), minutes)
    if not cells.fill(plan(settings, cells, work)):
        return
    facts = summary(cells.cells, settings)
    cells.save(summary=facts)
    rows = []
    for name, f in facts.items():
        needles = [f"{n['right']}/{n['of']}, {n['nll']:.2f}" for n in list(f.values())[1:]]
        rows.append([*name.split(" | "), f"{f['articles']:.3f}", *needles])
    lengths = [f"needles {length}: right, NLL" for length, _ in settings.texts]
    print(table(["trained", "run", f"articles {settings.length}: NLL", *lengths], rows))


if __name__ == "__main__":
    run(app)
