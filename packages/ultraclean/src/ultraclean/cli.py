"""The `ultraclean` command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
Negatives = Annotated[list[Path], typer.Option(help="JSON lines of bad text; repeatable.")]
TextKey = Annotated[str, typer.Option(help="Column that holds the text.")]
SourceKey = Annotated[str, typer.Option(help="Column that says where a text is from.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]


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
    normaliser: Annotated[
        str, typer.Option(help="ultrafine, ultrafine-words, whitespace, dclm or zh-char.")
    ] = "ultrafine-words",
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json for the normaliser `ultrafine`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the balancing, the shuffle and fastText.")] = 0,
    threads: Annotated[int, typer.Option(help="1 is repeatable to the byte.")] = 1,
    text_key: TextKey = "text",
) -> None:
    """Train a classifier; the defaults are Ultra-FineWeb's. The larger class is cut to the smaller.

    A model has bucket · dim · 4 bytes: 2 GB with the defaults, in memory while training and on
    disk. Scoring afterwards reads 8 MB of it.
    """
    from ultraclean.classifier import train as fit
    from ultraclean.config import ClassifierConfig
    from ultraclean.reading import counting, texts

    config = ClassifierConfig(
        dim=dim, lr=lr, word_ngrams=word_ngrams, min_count=min_count, epochs=epochs, bucket=bucket,
        normaliser=normaliser, tokenizer=tokenizer, seed=seed, threads=threads,
    )  # fmt: skip
    with counting("texts read, then training:") as progress:
        classifier = fit(
            texts(positives, text_key, progress), texts(negatives, text_key, progress),
            config, output,
        )  # fmt: skip
    made = classifier.manifest
    print(f"{output}: trained on {made['texts_used']['pos']} good texts of {made['texts']['pos']} "
          f"and {made['texts_used']['neg']} bad of {made['texts']['neg']}")  # fmt: skip


@app.command("evaluate", hidden=True)
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
def score(
    classifier: Folder,
    inputs: Files,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON lines to write: the input's with their scores."),
    ] = None,
    text_key: TextKey = "text",
) -> None:
    """Add `ultraclean_score` to each line, or print the scores alone, in the order of the input.

    A malformed line is an error: `ultraclean filter --threshold 0` sets them aside instead.
    """
    from ultraclean._files import atomic_path
    from ultraclean.classifier import Classifier
    from ultraclean.jsonl import open_text, with_columns
    from ultraclean.reading import counting, with_scores

    model = Classifier.load(classifier)
    for path in inputs:
        open_text(path).close()
    if output is None:
        for _, _, found in with_scores(model, inputs, text_key):
            print(f"{found:.6f}")
        return
    done = 0
    with (
        counting("lines scored:") as progress,
        atomic_path(output) as partial,
        partial.open("wb") as out,
    ):
        for raw, record, found in with_scores(model, inputs, text_key):
            out.write(with_columns(raw, record, {"ultraclean_score": round(found, 6)}))
            done += 1
            progress(done)
    print(f"{output}: {done} lines")


@app.command("filter")
def filter_(
    classifier: Folder,
    inputs: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    threshold: Annotated[
        float | None, typer.Option(help="Keep scores of at least this.", show_default="0.5")
    ] = None,
    keep_fraction: Annotated[
        float | None,
        typer.Option(
            "--keep-fraction", "--keep",
            help="Keep this share of all characters, the best-scoring; reads the input twice.",
        ),
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Reject shorter texts.")] = 0,
    drop_duplicates: Annotated[bool, typer.Option(help="Reject texts seen before.")] = False,
    strict: Annotated[bool, typer.Option(help="Stop at a malformed line.")] = False,
    restart: Annotated[
        bool, typer.Option(help="Remove what an earlier call wrote there; else go on with it.")
    ] = False,
    text_key: TextKey = "text",
    source_key: SourceKey = "source",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Split inputs into kept.jsonl, rejected.jsonl and malformed.jsonl; every line is counted.

    After a kill, the same command goes on where it was. report.json has the counts by source and
    reason, and examples.
    """
    from ultraclean.classifier import Classifier
    from ultraclean.filter import filter_corpus, threshold_for_corpus
    from ultraclean.reading import counting

    if threshold is not None and keep_fraction is not None:
        raise ValueError("--threshold and --keep-fraction exclude each other: give one of them")
    model = Classifier.load(classifier)
    chosen: dict[str, Any] = {
        "text_key": text_key, "min_chars": min_chars, "drop_duplicates": drop_duplicates
    }  # fmt: skip
    if keep_fraction is not None:
        with counting("lines scored, to find the threshold:") as progress:
            threshold = threshold_for_corpus(
                inputs, model, keep_fraction, **chosen, progress=progress
            )
    threshold = 0.5 if threshold is None else threshold
    with counting("lines filtered:") as progress:
        report = filter_corpus(
            inputs, output, model, threshold=threshold, source_key=source_key, strict=strict,
            resume=not restart, progress=progress, **chosen,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"threshold": threshold, **report.to_dict()}))
        return
    print(f"{report.total} lines = {report.kept} kept + {report.rejected} rejected + "
          f"{report.malformed} malformed (threshold {threshold:g})")  # fmt: skip
    for reason, count in {**report.reasons, **report.malformed_reasons}.items():
        print(f"  {reason}: {count}")


@app.command()
def inspect(
    classifier: Folder,
    words: Annotated[int, typer.Option(help="How many words of each end to show.")] = 15,
) -> None:
    """Show how a classifier was trained, and which words speak for and against a text.

    The number beside a word is its share in the logit: that of a text is the mean over its words
    and n-grams.
    """
    from ultraclean.classifier import Classifier

    model = Classifier.load(classifier)
    print(json.dumps({k: v for k, v in model.manifest.items() if k != "files"}, indent=2))
    ranked = model.scorer.words_by_scalar()
    for title, chosen in (("for", ranked[:words]), ("against", ranked[::-1][:words])):
        print(f"\nwords that speak {title} a text:")
        for word, scalar in chosen:
            print(f"  {scalar:+9.4f}  {word}")


def main() -> None:
    """Console script."""
    _cli.run(app)
