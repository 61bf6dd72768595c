"""Commands that train or ask a language model: verify, loop, generate."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ultraclean._cli_options import (
    AsJson,
    JsonLines,
    Named,
    Negatives,
    Normaliser,
    Output,
    TextKey,
    Tokenizer,
    named_files,
)  # fmt: skip

Base = Annotated[
    Path | None,
    typer.Option(
        help="Hugging Face folder of a nearly trained model.",
        show_default="a small one, trained on the default mix into OUTPUT/base",
    ),
]
Default = Annotated[list[Path], typer.Option(help="JSON lines of the default mix; repeatable.")]
Candidate = Annotated[float, typer.Option(help="Share of the candidate in the mix.")]
Tokens = Annotated[int, typer.Option(help="Tokens that each arm trains on.")]
Seeds = Annotated[int, typer.Option(help="Runs of each arm.")]
Micro = Annotated[
    int, typer.Option(help="Most windows in a pass, for memory's sake.", show_default="a batch")
]
BaseTokens = Annotated[int, typer.Option(help="Tokens that a base made here trains on.")]


def verify(
    pool: Named,
    default: Default,
    evaluation: Named,
    output: Output,
    base: Base = None,
    candidate: Candidate = 0.3,
    tokens: Tokens = 100_000,
    seeds: Seeds = 3,
    lr: Annotated[float, typer.Option(help="Rate at the start of the decay.")] = 3e-3,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 128,
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 16,
    micro: Micro = 0,
    base_tokens: BaseTokens = 1_000_000,
    text_key: TextKey = "text",
    as_json: AsJson = False,
) -> None:
    """Does a pool of text help a language model? Anneal one on it, with a control and error bars.

    A nearly trained model decays its rate on 30 % candidate and 70 % default mix; the control sees
    the default mix alone. Goes on after a kill. A GPU is used where there is one; started by
    torchrun or `accelerate launch` (-m ultraclean.cli verify …), several processes or DeepSpeed.
    """
    from ultraclean.processes import launched
    from ultraclean.reading import stepping
    from ultraclean.verification import Recipe
    from ultraclean.verification import verify as run

    recipe = Recipe(
        candidate=candidate, tokens=tokens, seeds=seeds, lr=lr, length=length, batch=batch
    )
    processes = launched()
    _quiet()
    pools, judges = _all(pool, "--pool", text_key), _all(evaluation, "--evaluation", text_key)
    mix = _texts(default, text_key)
    folder = _base(base, mix, output, base_tokens, length, batch, lr, micro)
    with stepping("arms trained", processes.writes) as progress:
        found = run(folder, pools, mix, judges, recipe, output, progress, micro)
    processes.leave()
    if not processes.writes:
        return
    if as_json:
        print(json.dumps({"recipe": asdict(recipe), **found.to_dict()}))
        return
    print(found.table())
    print(f"\naccepted: {', '.join(found.accepted) or 'none (no mean gain is more than noise)'}")
    spent = found.ledger
    print(f"cost: {spent['tokens_trained']:,} tokens, {spent['flops']:.3g} FLOPs"
          + (f", {spent['share_of_scratch']:.1%} of training each arm from scratch"
             if "share_of_scratch" in spent else ""))  # fmt: skip


def loop(
    pool: Named,
    negatives: Negatives,
    sample: Annotated[list[Path], typer.Option(help="JSON lines of the corpus to filter.")],
    default: Default,
    evaluation: Named,
    output: Output,
    base: Base = None,
    rounds: Annotated[int, typer.Option(help="At most.")] = 3,
    keep: Annotated[float, typer.Option(help="Share of the sample to keep.")] = 0.3,
    dim: Annotated[int, typer.Option(help="Of the classifier.")] = 256,
    bucket: Annotated[int, typer.Option(help="Of the classifier.")] = 2_000_000,
    min_count: Annotated[int, typer.Option(help="Of the classifier.")] = 5,
    epochs: Annotated[int, typer.Option(help="Of the classifier.")] = 3,
    classifier_lr: Annotated[float, typer.Option(help="Of the classifier.")] = 0.1,
    normaliser: Normaliser = "ultrafine-words",
    tokenizer: Tokenizer = None,
    candidate: Candidate = 0.3,
    tokens: Tokens = 100_000,
    seeds: Seeds = 3,
    lr: Annotated[float, typer.Option(help="The language model's, at the decay's start.")] = 3e-3,
    base_tokens: BaseTokens = 1_000_000,
    text_key: TextKey = "text",
    as_json: AsJson = False,
) -> None:
    """Seeds → classifier → filtered sample → verify → better seeds, until nothing is gained."""
    from ultraclean.config import ClassifierConfig
    from ultraclean.processes import launched
    from ultraclean.reading import counting
    from ultraclean.seed_loop import loop as run
    from ultraclean.verification import Recipe

    config = ClassifierConfig(
        dim=dim, bucket=bucket, min_count=min_count, epochs=epochs, lr=classifier_lr,
        normaliser=normaliser, tokenizer=tokenizer,
    )  # fmt: skip
    recipe = Recipe(candidate=candidate, tokens=tokens, seeds=seeds, lr=lr)
    processes = launched()
    _quiet()
    pools, judges = _all(pool, "--pool", text_key), _all(evaluation, "--evaluation", text_key)
    bad, crawl, mix = (_texts(files, text_key) for files in (negatives, sample, default))
    folder = _base(base, mix, output, base_tokens, recipe.length, recipe.batch, lr, 0)
    with counting("steps:", processes.writes) as progress:
        steps = iter(range(1, 1000))
        report = run(
            folder, pools, bad, crawl, mix, judges, output, config=config, recipe=recipe,
            keep=keep, most_rounds=rounds, progress=lambda what: progress(next(steps)),
        )  # fmt: skip
    processes.leave()
    if not processes.writes:
        return
    if as_json:
        print(json.dumps(report.to_dict()))
        return
    print(f"seeds: {', '.join(report.accepted)}")
    for number, row in enumerate(report.rounds, 1):
        print(f"round {number}: {row.positives} + {row.negatives} seeds, {row.kept} kept, gain "
              f"{row.gain:+.4f} ± {row.error:.4f} bits/byte: {row.verdict}")  # fmt: skip
    print(f"{report.stopped}; best classifier: {report.best or 'none'}")


def generate(
    inputs: JsonLines,
    output: Output,
    task: Annotated[str, typer.Option(help="rewrite, textbook, qa or forum.")],
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, up to /v1.")],
    model: Annotated[str, typer.Option(help="Its name for the model.")],
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the endpoint's key.")
    ] = "OPENAI_API_KEY",
    workers: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    temperature: Annotated[float, typer.Option(help="0..2.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 2048,
    text_key: TextKey = "text",
    as_json: AsJson = False,
) -> None:
    """Rewrite text as a textbook passage, questions and answers, or a discussion.

    Answers are cached: after a kill, or with more input, only what is missing is asked for. Each is
    checked; what fails goes to failed.jsonl with the reason.
    """
    import os

    from ultraclean.generation import Endpoint
    from ultraclean.generation import generate as run
    from ultraclean.reading import counting

    endpoint = Endpoint(url, model, os.environ.get(key_variable, ""), temperature, max_tokens)
    try:
        with counting("texts done:") as progress:
            report = run(inputs, output, task, endpoint, workers, text_key, progress)
    except ConnectionError as error:
        raise ValueError(
            f"{error}: start the server, or mend --url, --model or the key, and run the same "
            "command again; the answers so far are kept"
        ) from None
    if as_json:
        print(json.dumps(report))
        return
    print(f"{report['total']} texts = {report['generated']} generated + {report['failed']} failed")
    for reason, count in report["reasons"].items():
        print(f"  {reason}: {count}")


def _quiet() -> None:
    """transformers' bars for each small file would hide ours."""
    from ultraclean.proxy_model import libraries

    libraries()[1].utils.logging.disable_progress_bar()


def _texts(files: list[Path], key: str) -> list[str]:
    from ultraclean.reading import records

    return [record[key] for _, record in records(files, key)]


def _all(values: list[str], option: str, key: str) -> dict[str, list[str]]:
    return {name: _texts(files, key) for name, files in named_files(values, option).items()}


def _base(
    base: Path | None, mix: list[str], output: Path, tokens: int, length: int, batch: int,
    lr: float, micro: int,
) -> Path:  # fmt: skip
    """The given model, or one made of the default mix; an equal one made before is taken."""
    if base is not None:
        return base
    from ultraclean.base_model import make_base
    from ultraclean.processes import launched
    from ultraclean.reading import counting

    folder, processes = output / "base", launched()
    if not processes.agree((folder / "base.json").is_file):
        with counting("steps of the base:", processes.writes) as progress:
            make_base(mix, folder, tokens=tokens, length=length, batch=batch, lr=lr, micro=micro,
                      progress=progress)  # fmt: skip
    return folder
