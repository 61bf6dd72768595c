"""The `ultraclean` command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ultraclean import _cli

app = typer.Typer(
    help="Train a quality classifier on good and bad text, score text with it, keep the good part.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Files = Annotated[list[Path], typer.Argument(help="JSON lines (.jsonl, .jsonl.gz, .jsonl.zst).")]
Folder = Annotated[Path, typer.Argument(help="Classifier folder, as `ultraclean train` writes it.")]
Negatives = Annotated[list[Path], typer.Option(help="JSON lines of text to drop; repeatable.")]
TextKey = Annotated[str, typer.Option(help="Column that holds the text.")]


def _texts(files: list[Path], key: str) -> Iterator[str]:
    from ultraclean.jsonl import lines, parse

    for path in files:
        for number, raw in lines(path):
            if raw.strip():
                record, reason = parse(raw, key)
                if record is None:
                    raise ValueError(f"{path}:{number}: {reason}: repair or remove the line")
                yield record[key]


@contextmanager
def _counting(what: str) -> Iterator:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(what + " {task.completed:,.0f}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("")
        yield lambda done: bar.update(task, completed=done)


@app.command()
def train(
    positives: Annotated[list[Path], typer.Argument(help="JSON lines of text to keep.")],
    negatives: Negatives,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dim: Annotated[int, typer.Option(help="Width of an embedding row.")] = 256,
    lr: Annotated[float, typer.Option(help="fastText's learning rate.")] = 0.1,
    word_ngrams: Annotated[int, typer.Option(help="Longest word n-gram.")] = 3,
    min_count: Annotated[int, typer.Option(help="Rarer words have no row of their own.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the seeds.")] = 3,
    bucket: Annotated[int, typer.Option(help="Rows for n-grams: 4 · dim bytes each.")] = 2_000_000,
    normaliser: Annotated[
        str, typer.Option(help="ultrafine, ultrafine-words, whitespace, dclm or zh-char.")
    ] = "ultrafine-words",
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json for the normaliser `ultrafine`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle and of fastText.")] = 0,
    threads: Annotated[int, typer.Option(help="1 is repeatable to the byte.")] = 1,
    text_key: TextKey = "text",
) -> None:
    """Train a classifier; the defaults are Ultra-FineWeb's."""
    from ultraclean.classifier import train as fit
    from ultraclean.config import ClassifierConfig

    config = ClassifierConfig(
        dim=dim, lr=lr, word_ngrams=word_ngrams, min_count=min_count, epochs=epochs, bucket=bucket,
        normaliser=normaliser, tokenizer=tokenizer, seed=seed, threads=threads,
    )  # fmt: skip
    classifier = fit(_texts(positives, text_key), _texts(negatives, text_key), config, output)
    used = classifier.manifest["texts_used"]
    print(f"{output}: trained on {used['pos']} good and {used['neg']} bad texts")


@app.command()
def evaluate(
    classifier: Folder,
    positives: Annotated[list[Path], typer.Option(help="JSON lines of good text; repeatable.")],
    negatives: Negatives,
    threshold: Annotated[float, typer.Option(help="For precision, recall and F1.")] = 0.5,
    text_key: TextKey = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """AUC with its interval, precision, recall, F1 and calibration on text with known labels."""
    from ultraclean import evaluate as measure
    from ultraclean.classifier import Classifier

    model = Classifier.load(classifier)
    good = model.score(_texts(positives, text_key)).tolist()
    bad = model.score(_texts(negatives, text_key)).tolist()
    scores, labels = good + bad, [True] * len(good) + [False] * len(bad)
    value, low, high = measure.bootstrap_auc(scores, labels)
    at = measure.precision_recall_f1(scores, labels, threshold)
    result = {
        "texts": {"good": len(good), "bad": len(bad)},
        "auc": value,
        "auc_95": [low, high],
        "threshold": threshold,
        "precision": at.precision,
        "recall": at.recall,
        "f1": at.f1,
        "calibration_error": measure.calibration(scores, labels)[1],
    }
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"AUC {value:.4f} (95 % {low:.4f} – {high:.4f}) on {len(good)} good, {len(bad)} bad texts"
    )
    print(f"at {threshold}: precision {at.precision:.3f}, recall {at.recall:.3f}, F1 {at.f1:.3f}")
    print(f"calibration error {result['calibration_error']:.3f}")


@app.command()
def score(
    classifier: Folder,
    inputs: Files,
    text_key: TextKey = "text",
) -> None:
    """Print one score a line for each line of the inputs, in order."""
    from ultraclean.classifier import Classifier

    model = Classifier.load(classifier)
    for text in _texts(inputs, text_key):
        print(f"{model.score([text])[0]:.6f}")


@app.command("filter")
def filter_(
    classifier: Folder,
    inputs: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    threshold: Annotated[float | None, typer.Option(help="Keep scores of at least this.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Keep this share of all characters, the best-scoring; reads twice."),
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Reject shorter texts.")] = 0,
    drop_duplicates: Annotated[bool, typer.Option(help="Reject texts seen before.")] = False,
    strict: Annotated[bool, typer.Option(help="Stop at a malformed line.")] = False,
    text_key: TextKey = "text",
    source_key: Annotated[str, typer.Option(help="Column to count by.")] = "source",
) -> None:
    """Split inputs into kept.jsonl, rejected.jsonl and malformed.jsonl; resumes after a kill."""
    from ultraclean.classifier import Classifier
    from ultraclean.evaluate import threshold_for_budget
    from ultraclean.filter import filter_corpus

    if threshold is not None and keep is not None:
        raise ValueError("--threshold and --keep exclude each other: give one of them")
    model = Classifier.load(classifier)
    if keep is not None:
        texts = list(_texts(inputs, text_key))
        threshold = threshold_for_budget(model.score(texts), [len(t) for t in texts], keep)
        # What is written is rounded to six digits, so the threshold must not be above that.
        threshold = min(1.0, round(threshold, 6))
        print(f"threshold {threshold:.6f} keeps {keep:.0%} of the characters")
    with _counting("lines filtered:") as progress:
        report = filter_corpus(
            inputs, output, model, threshold=0.5 if threshold is None else threshold,
            text_key=text_key, source_key=source_key, min_chars=min_chars,
            drop_duplicates=drop_duplicates, strict=strict, progress=progress,
        )  # fmt: skip
    print(f"{report.total} lines = {report.kept} kept + {report.rejected} rejected + "
          f"{report.malformed} malformed")  # fmt: skip
    for reason, count in {**report.reasons, **report.malformed_reasons}.items():
        print(f"  {reason}: {count}")


@app.command()
def inspect(
    classifier: Folder,
    words: Annotated[int, typer.Option(help="How many words of each end to show.")] = 15,
) -> None:
    """Show how a classifier was trained, and which words speak for and against a text."""
    from ultraclean.classifier import Classifier

    model = Classifier.load(classifier)
    print(json.dumps({k: v for k, v in model.manifest.items() if k != "files"}, indent=2))
    ranked = model.scorer.words_by_scalar()
    print("speak for:    ", " ".join(w for w, _ in ranked[:words]))
    print("speak against:", " ".join(w for w, _ in ranked[::-1][:words]))


def main() -> None:
    """Console script."""
    _cli.run(app)
