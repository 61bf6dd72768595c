"""Filter a corpus by score: every row is kept, rejected or malformed, and counted as such.

A file is read in blocks of rows. Blocks are parsed, scored, written out and packed by any number of
threads (nearly all of that happens outside the interpreter's lock), decided and appended in order.
So one file keeps all cores busy, and the outputs do not depend on how many there are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ultraclean.classifier import Classifier
from ultraclean.heuristics import Heuristics, Judged, judge
from ultraclean.jsonl import LONGEST
from ultraclean.jsonl_format import JsonLines, Rows, utf8
from ultraclean.minhash import Decontaminator
from ultraclean.ordered import ahead, in_order_twice
from ultraclean.outputs import Outputs, clear, finished, only_run
from ultraclean.packing import PACKINGS
from ultraclean.parquet_format import Parquet
from ultraclean.report import FilterReport
from ultraclean.warc import Warc

SHOWN_CHARS = 300  # of an example's text

_log = logging.getLogger(__name__)


def filter_corpus(
    inputs: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    classifier: Classifier,
    *,
    threshold: float = 0.5,
    text_key: str = "text",
    source_key: str = "source",
    min_chars: int = 0,
    drop_duplicates: bool = False,
    evaluations: Decontaminator | None = None,
    max_bytes: int = LONGEST,
    compress: str = "",
    workers: int = 1,
    strict: bool = False,
    resume: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> FilterReport:
    """Write kept, rejected and malformed rows and `report.json` into a folder.

    A row that holds text keeps every column as it was (of JSON lines, byte for byte).
    `ultraclean_score`, of six digits, is added, and `ultraclean_reason` to a rejected row: `score`,
    `short` (fewer than `min_chars` characters) or `duplicate` (the same text came before). Rejected
    rows have a score too, so that what the heuristics drop can be judged. Malformed rows are kept
    with file, number and reason. Memory does not grow with the corpus, but for `drop_duplicates`.

    A killed run is continued by the same call, having lost a second or two of work, and ends with
    the same bytes as an uninterrupted one, whatever the number of workers.

    Args:
        inputs: all .jsonl (or .json), .jsonl.gz or .jsonl.zst files; or all .parquet, which makes
            Parquet; or all .warc, .warc.gz, .wet.gz, which makes JSON lines. In the order given.
        output: folder; the same call on a finished one returns its report at once.
        classifier: scores the text.
        threshold: a text is kept if its score, rounded to six digits, is at least this, 0..1.
        text_key: column of the text.
        source_key: column to count by; rows without it count under "".
        min_chars: shorter texts are rejected; 0, none.
        drop_duplicates: reject texts seen before.
        evaluations: reject texts that share n-grams with an evaluation's, reason `contaminated`.
        max_bytes: a longer line is malformed, reason `too long`; of it only the start is kept.
        compress: "", "gz" or "zst": of outputs that are JSON lines.
        workers: threads.
        strict: a malformed row is an error.
        resume: False removes what an earlier call wrote into `output`, finished or not.
        progress: called with the number of rows done.

    Raises:
        FileNotFoundError: an input is missing or a folder.
        ValueError: an input is damaged or no text, `strict` and a malformed row, a setting out of
            range, or an output folder that belongs to another call or to a run under way.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, got {threshold}")
    for name, value in (("min_chars", min_chars), ("max_bytes", max_bytes)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    files = [Path(path) for path in inputs]
    form = format_of(files, text_key, source_key, max_bytes, compress)
    job = {
        "inputs": [[utf8(str(p)), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "classifier": classifier.identity,
        "threshold": threshold,
        "text_key": text_key,
        "source_key": source_key,
        "min_chars": min_chars,
        "drop_duplicates": drop_duplicates,
        "max_bytes": max_bytes,
        "evaluations": evaluations and evaluations.fingerprint,
        "suffix": form.suffix,
    }
    folder = Path(output)
    with only_run(folder):
        if not resume:
            clear(folder)
        if (done := finished(folder, job, form.suffix)) is not None:
            return done
        work = Outputs(folder, job, form)
        try:
            if not work.complete:
                rules = Heuristics(min_chars, drop_duplicates, evaluations)
                if work.resumed:
                    _log.info("%s: going on after %d rows", folder, work.report.total)
                _Run(files, form, classifier, rules, threshold, strict, work, progress)(workers)
            return work.finish()
        finally:
            work.close()


class _Run:
    """One run: what its steps share."""

    def __init__(
        self, files: list[Path], form: JsonLines | Parquet, classifier: Classifier,
        rules: Heuristics, threshold: float, strict: bool, work: Outputs,
        progress: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.files, self.form, self.classifier, self.rules = files, form, classifier, rules
        self.threshold, self.strict, self.work, self.progress = threshold, strict, work, progress

    def __call__(self, workers: int) -> None:
        for place, (path, judged), reasons, packed in in_order_twice(
            ahead(self._blocks(), workers), self._judge, self._decide, self._render, workers
        ):
            index, number = place
            for name, data in packed.items():
                self.work.write(name, data)
            self._count(path, judged, reasons)
            self.work.advance(index, number + 1)
            self.progress(self.work.report.total)

    def _blocks(self) -> Iterator[tuple[tuple[int, int], Any]]:
        """((file, number), (path, block)) of what is not done yet."""
        first, done = self.work.file, self.work.block  # which go on while this runs
        for index, path in enumerate(self.files):
            for number, block in enumerate(self.form.blocks(path)):
                if (index, number) >= (first, done):
                    yield (index, number), (path, block)
                elif self.rules.drop_duplicates:  # which texts came before the kill
                    rows = self.form.parse(block)
                    for text, problem in zip(rows.texts, rows.problems, strict=True):
                        if not problem:
                            self.rules.is_duplicate(self.rules.key(text))
                elif index < first:
                    break

    def _judge(self, item: tuple[Path, Any]) -> tuple[Path, Judged]:
        path, block = item
        return path, judge(self.form.parse(block), self.classifier, self.rules)

    def _decide(self, found: tuple[Path, Judged]) -> list[str]:
        path, judged = found
        if self.strict:
            _refuse_malformed(path, judged.rows)
        return self.rules.reasons(judged, self.threshold)

    def _render(self, found: tuple[Path, Judged], reasons: list[str]) -> dict[str, bytes]:
        path, judged = found
        return self.form.render(path, judged.rows, judged.scores, reasons)

    def _count(self, path: Path, judged: Judged, reasons: list[str]) -> None:
        rows, report = judged.rows, self.work.report
        usable = []
        for i, problem in enumerate(rows.problems):
            if problem == "blank":
                report.blank += 1
            elif problem:
                report.count_malformed(problem)
            else:
                usable.append(i)

        def example(place: int) -> dict[str, Any]:
            i = usable[place]
            return {
                "score": judged.scores[i],
                "source": rows.sources[i],
                "file": utf8(str(path)),
                "line": rows.numbers[i],
                "text": utf8(rows.texts[i][:SHOWN_CHARS]),
            }

        report.count_block(
            [rows.sources[i] for i in usable],
            [reasons[i] for i in usable],
            [judged.scores[i] for i in usable],
            example,
        )


def format_of(
    files: list[Path], text_key: str, source_key: str, max_bytes: int, compress: str
) -> JsonLines | Parquet:
    """How the inputs are read and the outputs written, by the inputs' names.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: no input, or inputs of several kinds, or what the format finds wrong.
    """
    if not files:
        raise ValueError("no input to filter: name at least one file")
    if compress not in PACKINGS:
        raise ValueError(f"compress must be gz or zst, or nothing, got {compress!r}")
    kinds = {_kind(path) for path in files}
    if len(kinds) > 1:
        raise ValueError(f"inputs of several kinds ({', '.join(sorted(kinds))}): filter each apart")
    kind = kinds.pop()
    if kind == "Parquet":
        if compress:
            raise ValueError("Parquet packs its columns itself: leave compress out")
        form: JsonLines | Parquet = Parquet(text_key, source_key, max_bytes)
    else:
        made = Warc if kind == "WARC" else JsonLines
        form = made(text_key, source_key, max_bytes, compress)
    for path in files:
        form.check(path)
    return form


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        return "Parquet"
    return "WARC" if name.endswith((".warc", ".wet")) else "JSON lines"


def _refuse_malformed(path: Path, rows: Rows) -> None:
    for number, problem in zip(rows.numbers, rows.problems, strict=True):
        if problem and problem != "blank":
            raise ValueError(f"{path}:{number}: {problem} (strict): repair or remove the line")
