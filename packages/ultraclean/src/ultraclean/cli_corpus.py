"""Commands that read a corpus: score, dedup, inspect."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ultraclean._cli_options import (
    AsJson,
    By,
    Compress,
    DropDuplicates,
    Folder,
    Inputs,
    MinChars,
    Output,
    SourceKey,
    TextKey,
    Workers,
)  # fmt: skip


def score(
    classifier: Folder,
    inputs: Inputs,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; without it scores are printed."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Keep scores of at least this.", show_default="0.5")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Keep this share, the best-scoring; reads the input twice."),
    ] = None,
    by: By = "characters",
    min_chars: MinChars = 0,
    drop_duplicates: DropDuplicates = False,
    decontaminate: Annotated[
        list[Path] | None,
        typer.Option(help="JSON lines of evaluation texts: reject what shares 13 words in a row."),
    ] = None,
    workers: Workers = 1,
    compress: Compress = "",
    strict: Annotated[bool, typer.Option(help="Stop at a malformed row.")] = False,
    restart: Annotated[
        bool, typer.Option(help="Remove what an earlier call wrote there; else go on with it.")
    ] = False,
    text_key: TextKey = "text",
    source_key: SourceKey = "source",
    as_json: AsJson = False,
) -> None:
    """Score every row and split inputs into kept, rejected and malformed ones; each is counted.

    Every column stays; `ultraclean_score` joins it, and `ultraclean_reason` where a row is
    rejected. After a kill, the same command goes on where it was. report.json has the counts by
    source and reason, and examples; `ultraclean inspect` makes a page of the folder.
    """
    from ultraclean.budget import thresholds_for_corpus
    from ultraclean.classifier import Classifier
    from ultraclean.filter import filter_corpus
    from ultraclean.minhash import Decontaminator
    from ultraclean.reading import counting, print_scores, texts

    if threshold is not None and keep is not None:
        raise ValueError("--threshold and --keep exclude each other: give one of them")
    model = Classifier.load(classifier)
    if output is None:
        print_scores(model, inputs, text_key)
        return
    chosen: dict[str, Any] = {
        "text_key": text_key, "min_chars": min_chars, "drop_duplicates": drop_duplicates,
        "workers": workers,
    }  # fmt: skip
    if keep is not None:
        with counting("rows scored, to find the threshold:") as progress:
            (threshold,) = thresholds_for_corpus(
                inputs, model, [keep], **chosen, by=by, progress=progress
            )
    threshold = 0.5 if threshold is None else threshold
    known = None
    if decontaminate:
        with counting("evaluation texts read:") as progress:
            known = Decontaminator(texts(decontaminate, text_key, progress))
    with counting("rows filtered:") as progress:
        report = filter_corpus(
            inputs, output, model, threshold=threshold, source_key=source_key, strict=strict,
            evaluations=known, compress=compress, resume=not restart, progress=progress, **chosen,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"threshold": threshold, **report.to_dict()}))
        return
    print(f"{report.total} rows = {report.kept} kept + {report.rejected} rejected + "
          f"{report.malformed} malformed (threshold {threshold:g})")  # fmt: skip
    for reason, count in {**report.reasons, **report.malformed_reasons}.items():
        print(f"  {reason}: {count}")


def dedup(
    inputs: Inputs,
    output: Output,
    bands: Annotated[int, typer.Option(help="Bands of the LSH.")] = 14,
    rows: Annotated[int, typer.Option(help="Hash functions in a band.")] = 8,
    ngrams: Annotated[int, typer.Option(help="Words in a shingle.")] = 5,
    workers: Workers = 1,
    compress: Compress = "",
    text_key: TextKey = "text",
    as_json: AsJson = False,
) -> None:
    """Set near-duplicates aside (MinHash): of each cluster the first row stays.

    At 14 bands of 8, as in FineWeb, two texts are found half of the time at a Jaccard similarity
    of 0.72 of their 5-grams.
    """
    from ultraclean.dedup import deduplicate
    from ultraclean.reading import counting

    with counting("rows signed:") as progress:
        report = deduplicate(
            inputs, output, bands=bands, rows=rows, ngrams=ngrams, text_key=text_key,
            workers=workers, compress=compress, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(report)))
        return
    print(f"{report.total} rows = {report.kept} kept + {report.near_duplicates} near-duplicates + "
          f"{report.malformed} malformed; {report.clusters} clusters")  # fmt: skip


def inspect(
    folder: Annotated[Path, typer.Argument(help="A classifier, or what `score -o` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file", show_default="in the folder")
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts shown of each source and score band.")] = 3,
    words: Annotated[int, typer.Option(help="Of a classifier: words shown of each end.")] = 15,
    text_key: TextKey = "text",
    source_key: SourceKey = "source",
) -> None:
    """A page of kept and rejected texts by score and source; of a classifier, its words.

    The number beside a word is its share in the logit: that of a text is the mean over its words
    and n-grams.
    """
    if (folder / "report.json").is_file():
        from ultraclean.page import write_page

        path = output or folder / "inspect.html"
        shown = write_page(folder, path, samples, text_key, source_key)
        print(f"{path}: {shown} texts")
        return
    from ultraclean.classifier import Classifier

    model = Classifier.load(folder)
    print(json.dumps({k: v for k, v in model.manifest.items() if k != "files"}, indent=2))
    ranked = model.scorer.words_by_scalar()
    for title, chosen in (("for", ranked[:words]), ("against", ranked[::-1][:words])):
        print(f"\nwords that speak {title} a text:")
        for word, scalar in chosen:
            print(f"  {scalar:+9.4f}  {word}")
