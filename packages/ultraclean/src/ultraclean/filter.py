"""Filter JSON lines by score: every line is kept, rejected or malformed, and counted as such."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ultraclean.classifier import Classifier
from ultraclean.evaluate import threshold_for_budget
from ultraclean.jsonl import LONGEST, lines, open_text, parse, with_columns
from ultraclean.outputs import Outputs, clear, finished, only_run
from ultraclean.report import FilterReport

CHUNK_LINES, CHUNK_BYTES = 512, 1 << 22
SHOWN_BYTES = 1000  # of a line too long to repeat
SHOWN_CHARS = 300  # of an example's text, and of a source's name

_log = logging.getLogger(__name__)


class Heuristics:
    """What is rejected whatever its score: texts that are too short, or came before.

    Args:
        min_chars: shorter texts are `short`; 0 turns it off.
        drop_duplicates: texts equal to an earlier one, to the character, are `duplicate`; costs
            some 120 bytes of memory for each different text.
    """

    def __init__(self, min_chars: int = 0, drop_duplicates: bool = False) -> None:
        self.min_chars, self.drop_duplicates = min_chars, drop_duplicates
        self._seen: set[bytes] = set()

    def reason(self, text: str) -> str:
        """`duplicate`, `short` or "", and remember the text."""
        if self.drop_duplicates:
            key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if key in self._seen:
                return "duplicate"
            self._seen.add(key)
        return "short" if len(text) < self.min_chars else ""


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
    max_bytes: int = LONGEST,
    strict: bool = False,
    resume: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> FilterReport:
    """Write `kept.jsonl`, `rejected.jsonl`, `malformed.jsonl` and `report.json` into a folder.

    A line that holds text keeps every column as it was, byte for byte. `ultraclean_score`, of six
    digits, is added, and `ultraclean_reason` to a rejected line: `score`, `short` (fewer than
    `min_chars` characters) or `duplicate` (the same text came before). Rejected lines have a score
    too, so that what the heuristics drop can be judged. Malformed lines are kept with file, number
    and reason. Memory does not grow with the corpus, but for `drop_duplicates`.

    A killed run is continued by the same call, having lost a second or two of work, and ends with
    the same bytes as an uninterrupted one.

    Args:
        inputs: .jsonl, .jsonl.gz or .jsonl.zst files, read in the order given.
        output: folder; the same call on a finished one returns its report at once.
        classifier: scores the text.
        threshold: a text is kept if its score, rounded to six digits, is at least this, 0..1.
        text_key: column of the text.
        source_key: column to count by; lines without it count under "".
        min_chars: shorter texts are rejected; 0, none.
        drop_duplicates: reject texts seen before.
        max_bytes: a longer line is malformed, reason `too long`; of it only the start is kept.
        strict: a malformed line is an error.
        resume: False removes what an earlier call wrote into `output`, finished or not.
        progress: called with the number of lines done.

    Raises:
        FileNotFoundError: an input is missing or a folder.
        ValueError: an input is damaged or no text, `strict` and a malformed line, a setting out of
            range, or an output folder that belongs to another call or to a run under way.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, got {threshold}")
    for name, value in (("min_chars", min_chars), ("max_bytes", max_bytes)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    files = [Path(path) for path in inputs]
    if not files:
        raise ValueError("no input to filter: name at least one file")
    for path in files:
        open_text(path).close()  # before anything is made
    job = {
        "inputs": [[_utf8(str(p)), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "classifier": classifier.identity,
        "threshold": threshold,
        "text_key": text_key,
        "source_key": source_key,
        "min_chars": min_chars,
        "drop_duplicates": drop_duplicates,
        "max_bytes": max_bytes,
    }
    folder = Path(output)
    with only_run(folder):
        if not resume:
            clear(folder)
        if (done := finished(folder, job)) is not None:
            return done
        work = Outputs(folder, job)
        try:
            if not work.complete:
                rules = Heuristics(min_chars, drop_duplicates)
                if work.resumed:
                    _log.info("%s: going on after %d lines", folder, work.report.total)
                    _remember(work, rules, text_key)
                for chunk in _chunks(files, work.file, work.line, text_key, max_bytes):
                    if strict:
                        _refuse_malformed(chunk)
                    _decide(chunk, work, classifier, rules, threshold, text_key, source_key)
                    progress(work.report.total)
            return work.finish()
        finally:
            work.close()


def threshold_for_corpus(
    inputs: Iterable[str | os.PathLike[str]],
    classifier: Classifier,
    keep: float,
    *,
    text_key: str = "text",
    min_chars: int = 0,
    drop_duplicates: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """The threshold at which `filter_corpus` keeps the best-scoring share of all characters.

    Reads everything once, malformed lines aside, and holds 12 bytes a text. The share is of what
    the heuristics leave; the other arguments are as for `filter_corpus`.

    Raises:
        ValueError: no usable text, or `keep` out of (0, 1].
    """
    rules = Heuristics(min_chars, drop_duplicates)
    scores, weights = array("d"), array("I")
    read = 0
    for chunk in _chunks([Path(p) for p in inputs], 0, 0, text_key, LONGEST):
        texts = [line.record[text_key] for line in chunk if line.record is not None]
        texts = [text for text in texts if not rules.reason(text)]
        scores.extend(_rounded(classifier, texts))
        weights.extend(map(len, texts))
        read += len(chunk)
        progress(read)
    if not scores:
        raise ValueError(f"no usable text on {read} lines: nothing to set a threshold by")
    return threshold_for_budget(scores, weights, keep)


class _Line(NamedTuple):
    file: int
    path: Path
    number: int
    raw: bytes
    record: dict[str, Any] | None
    reason: str
    """Why there is no record; "blank" if there is nothing at all."""


def _chunks(
    files: list[Path], file: int, done: int, text_key: str, max_bytes: int
) -> Iterator[list[_Line]]:
    """Lines not done yet, some hundreds at a time; a chunk never spans two files."""
    for index, path in enumerate(files):
        if index < file:
            continue
        chunk: list[_Line] = []
        size = 0
        for number, raw in lines(path, done if index == file else 0, max_bytes):
            record, reason = parse(raw, text_key, max_bytes) if raw.strip() else (None, "blank")
            chunk.append(_Line(index, path, number, raw, record, reason))
            size += len(raw)
            if len(chunk) == CHUNK_LINES or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


def _refuse_malformed(chunk: list[_Line]) -> None:
    for line in chunk:
        if line.record is None and line.reason != "blank":
            raise ValueError(
                f"{line.path}:{line.number}: {line.reason} (strict): repair or remove the line"
            )


def _rounded(classifier: Classifier, texts: list[str]) -> list[float]:
    """Scores as they are written, so that a reader of the file finds the same decision."""
    return [round(score, 6) for score in classifier.score(texts).tolist()]


def _decide(
    chunk: list[_Line],
    work: Outputs,
    classifier: Classifier,
    rules: Heuristics,
    threshold: float,
    text_key: str,
    source_key: str,
) -> None:
    """Write and count each line of a chunk."""
    usable = [line.record[text_key] for line in chunk if line.record is not None]
    scores = iter(_rounded(classifier, usable))
    for line in chunk:
        if line.record is None:
            if line.reason == "blank":
                work.report.blank += 1
            else:
                work.write("malformed", _malformed(line))
                work.report.count_malformed(line.reason)
            continue
        text, score = line.record[text_key], next(scores)
        reason = rules.reason(text) or ("" if score >= threshold else "score")
        columns: dict[str, Any] = {"ultraclean_score": score}
        if reason:
            columns["ultraclean_reason"] = reason
        work.write("rejected" if reason else "kept", with_columns(line.raw, line.record, columns))
        source = line.record.get(source_key)
        source = "" if source is None else _utf8(str(source)[:SHOWN_CHARS])
        shown = {"score": score, "source": source, "file": _utf8(str(line.path)),
                 "line": line.number, "text": _utf8(text[:SHOWN_CHARS])}  # fmt: skip
        work.report.count(source, reason, shown)
    work.advance(chunk[-1].file, chunk[-1].number)


def _utf8(text: str) -> str:
    """With "?" for lone surrogates: legal in JSON as escapes and in file names, not in UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _malformed(line: _Line) -> bytes:
    raw = line.raw[:SHOWN_BYTES] if line.reason == "too long" else line.raw.rstrip(b"\r\n")
    record = {
        "file": _utf8(str(line.path)),
        "line": line.number,
        "reason": line.reason,
        "raw": raw.decode("utf-8", "backslashreplace"),
    }
    return json.dumps(record).encode() + b"\n"


def _remember(work: Outputs, rules: Heuristics, text_key: str) -> None:
    """Read back which texts the outputs hold, as a killed run had seen them."""
    if rules.drop_duplicates:
        for name in ("kept", "rejected"):
            with work.partial(name).open("rb") as stream:
                for raw in stream:
                    rules.reason(json.loads(raw)[text_key])
