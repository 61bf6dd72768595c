"""The `ultraclean` command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ultraclean import _cli, cli_corpus, cli_verify
from ultraclean._cli_options import (
    AsJson,
    By,
    DropDuplicates,
    Folder,
    Inputs,
    MinChars,
    Negatives,
    Normaliser,
    SourceKey,
    TextKey,
    Tokenizer,
    Workers,
)  # fmt: skip

app = typer.Typer(
    help="Train a quality classifier on good and bad text, filter a corpus with it, and check on a "
    "small language model that the filtered text helps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("score")(cli_corpus.score)
app.command("dedup")(cli_corpus.dedup)
app.command("inspect")(cli_corpus.inspect)
app.command("verify")(cli_verify.verify)
app.command("loop")(cli_verify.loop)
app.command("generate")(cli_verify.generate)


@app.command()
def train(
    positives: Annotated[list[Path], typer.Argument(help="JSON lines of good text.")],
    negatives: Negatives,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dim: Annotated[int, typer.Option(help="Width of an embedding row.")] = 256,
    lr: Annotated[float, typer.Option(help="fastText's rate; few seeds need a larger one.")] = 0.1,
    word_ngrams: Annotated[int, typer.Option(help="Longest word n-gram.")] = 3,
    min_count: Annotated[int, typer.Option(help="Rarer words have no row of their own.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the seeds.")] = 3,
    bucket: Annotated[int, typer.Option(help="Rows for n-grams: 4 · dim bytes each.")] = 2_000_000,
    normaliser: Normaliser = "ultrafine-words",
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(help="Of the balancing, the shuffle and fastText.")] = 0,
    threads: Annotated[int, typer.Option(help="For counting words; of fastText, for all.")] = 1,
    trainer: Annotated[
        str, typer.Option(help="native, or fasttext: repeatable with one thread only.")
    ] = "native",
    text_key: TextKey = "text",
) -> None:
    """Train a classifier; the defaults are Ultra-FineWeb's. The larger class is cut to the smaller.

    The native trainer trains a fastText model of any width as one of width one: some 8 MB with the
    defaults, the same for any number of threads; after Ctrl-C the same command goes on. The
    library's model has bucket · dim · 4 bytes: 2 GB, in memory while training and on disk.
    """
    from ultraclean.config import ClassifierConfig
    from ultraclean.reading import counting, stepping, texts
    from ultraclean.training import train as fit

    config = ClassifierConfig(
        dim=dim, lr=lr, word_ngrams=word_ngrams, min_count=min_count, epochs=epochs, bucket=bucket,
        normaliser=normaliser, tokenizer=tokenizer, seed=seed, threads=threads, trainer=trainer,
    )  # fmt: skip
    with counting("texts read:") as progress:
        good = list(texts(positives, text_key, progress))
        bad = list(texts(negatives, text_key, progress))
    with stepping("words learned from") as steps:
        classifier = fit(good, bad, config, output, steps)
    made = classifier.manifest
    print(f"{output}: trained on {made['texts_used']['pos']} good texts of {made['texts']['pos']} "
          f"and {made['texts_used']['neg']} bad of {made['texts']['neg']}")  # fmt: skip


@app.command("eval")
def evaluate(
    classifier: Folder,
    positives: Annotated[list[Path], typer.Option(help="JSON lines of good text; repeatable.")],
    negatives: Negatives,
    threshold: Annotated[float, typer.Option(help="For precision, recall and F1.")] = 0.5,
    text_key: TextKey = "text",
    source_key: SourceKey = "source",
    as_json: AsJson = False,
) -> None:
    """AUC and F1 with intervals, calibration, a table by source, on text with known labels."""
    from ultraclean import evaluate as measure
    from ultraclean.classifier import Classifier
    from ultraclean.reading import counting, scored

    model = Classifier.load(classifier)
    with counting("texts scored:") as progress:
        good, from_good = scored(model, positives, text_key, source_key, progress)
        bad, from_bad = scored(model, negatives, text_key, source_key, progress)
    scores, labels = good + bad, [True] * len(good) + [False] * len(bad)
    value, low, high = measure.bootstrap_auc(scores, labels)
    at = measure.precision_recall_f1(scores, labels, threshold)
    f1 = measure.bootstrap_f1(scores, labels, threshold)
    bins, error = measure.calibration(scores, labels)
    sources = measure.by_source(scores, labels, from_good + from_bad, threshold)
    if as_json:
        precision = at.precision if at.precision == at.precision else None  # JSON has no NaN
        print(json.dumps({
            "texts": {"good": len(good), "bad": len(bad)}, "auc": value, "auc_95": [low, high],
            "threshold": threshold, "precision": precision, "recall": at.recall, "f1": at.f1,
            "f1_95": f1[1:], "calibration_error": error,
            "calibration": [dict(zip(("score", "good", "texts"), b, strict=True)) for b in bins],
            "sources": [asdict(row) for row in sources],
        }))  # fmt: skip
        return
    print(f"{len(good)} good, {len(bad)} bad texts; in brackets 95 % intervals")
    print(f"AUC {value:.4f} [{low:.4f}, {high:.4f}]")
    print(f"at {threshold}: precision {at.precision:.3f}, recall {at.recall:.3f}, "
          f"F1 {at.f1:.3f} [{f1[1]:.3f}, {f1[2]:.3f}]")  # fmt: skip
    print(f"calibration error {error:.3f}\n")
    print(f"{'score':>9} {'good':>6} {'texts':>7}")
    for mean, share, count in bins:
        print(f"{mean:9.3f} {share:6.3f} {count:7d}")
    print(f"\n{'source':24} {'label':5} {'texts':>7} {'score':>6} {'kept':>6} {'AUC':>6}")
    for row in sources:
        print(f"{row.source or '(none)':24.24} {'good' if row.good else 'bad':5} {row.texts:7d} "
              f"{row.mean_score:6.3f} {row.share_kept:6.3f} {row.auc:6.3f}")  # fmt: skip


@app.command()
def calibrate(
    classifier: Folder,
    inputs: Inputs,
    keep: Annotated[
        list[float] | None, typer.Option(help="Share to keep, in (0, 1]; repeatable.")
    ] = None,
    by: By = "characters",
    min_chars: MinChars = 0,
    drop_duplicates: DropDuplicates = False,
    workers: Workers = 1,
    text_key: TextKey = "text",
    as_json: AsJson = False,
) -> None:
    """Thresholds for a budget: which score keeps which share of a corpus's text.

    `--by texts` makes it a percentile: `--keep 0.1` is DCLM's best tenth.
    """
    from ultraclean.budget import thresholds_for_corpus
    from ultraclean.classifier import Classifier
    from ultraclean.reading import counting

    shares = keep or [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8]
    model = Classifier.load(classifier)
    with counting("rows scored:") as progress:
        found = thresholds_for_corpus(
            inputs, model, shares, text_key=text_key, min_chars=min_chars,
            drop_duplicates=drop_duplicates, by=by, workers=workers, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"by": by, "thresholds": dict(zip(map(str, shares), found, strict=True))}))
        return
    print(f"{'keep':>7}  threshold   (share of all {by})")
    for share, threshold in zip(shares, found, strict=True):
        print(f"{100 * share:6.1f}%  {threshold:.6f}")


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="fastText model, .bin or .ftz, with two labels.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Classifier folder to write.")],
    normaliser: Normaliser,
    tokenizer: Tokenizer = None,
    positive: Annotated[str, typer.Option(help="The model's label of good text.")] = "__label__pos",
    keep_model: Annotated[
        bool, typer.Option(help="Copy a .bin into the folder, for exact scores.")
    ] = False,
) -> None:
    """Make a classifier of anybody's fastText model: a table of a few MB, whatever its width.

    Nothing in the file says how its training text was made into words, so you must: with another
    normaliser its scores mean nothing. Ultra-FineWeb's own classifiers want `ultrafine` and
    DeepSeek-V2's tokenizer, DCLM's wants `dclm`.
    """
    from ultraclean.classifier import convert as make

    made = make(model, output, normaliser, tokenizer, positive=positive, keep_model=keep_model)
    size = (output / "scalars.npy").stat().st_size
    print(f"{output}: {len(made.scorer.words)} words, a table of {size / 1e6:.1f} MB")


def main() -> None:
    """Console script."""
    _cli.run(app)


if __name__ == "__main__":  # torchrun and accelerate start modules
    main()
