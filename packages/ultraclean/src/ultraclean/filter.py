"""Filter JSON lines by score: every line is kept, rejected or malformed, and counted as such.

The work is done in chunks of lines. After each, the outputs are flushed to disk and a progress
record is written: how many lines of which input are done, and how long each output then was. A
killed run cuts the outputs back to the record and goes on, so that its outputs are byte for byte
those of an uninterrupted run. Outputs are called `*.partial` until all is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ultraclean._files import write_json
from ultraclean.classifier import Classifier
from ultraclean.jsonl import lines, open_text, parse

CHUNK = 512
STREAMS = ("kept", "rejected", "malformed")


@dataclass
class FilterReport:
    """What became of every line: total = kept + rejected + malformed."""

    total: int = 0
    kept: int = 0
    rejected: int = 0
    malformed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Reason -> rejected lines."""
    malformed_reasons: dict[str, int] = field(default_factory=dict)
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    """Source -> {"kept": n, "rejected": n}."""


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
    strict: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> FilterReport:
    """Write `kept.jsonl`, `rejected.jsonl`, `malformed.jsonl` and `report.json` into a folder.

    Every column of a line is kept; `ultraclean_score` is added, and `ultraclean_reason` to a
    rejected line: `score`, `short` (fewer than `min_chars` characters) or `duplicate` (the same
    text came before). Malformed lines are kept as they were, with file, number and reason.

    Args:
        inputs: .jsonl, .jsonl.gz or .jsonl.zst files, read in the order given.
        output: folder; the same call on a finished one returns its report at once.
        classifier: scores the text.
        threshold: a text is kept if its score is at least this, 0..1.
        text_key: column of the text.
        source_key: column to count by; lines without it count under "".
        min_chars: shorter texts are rejected.
        drop_duplicates: reject texts seen before (16 bytes of memory for each text).
        strict: a malformed line is an error.
        progress: called with the number of lines done.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an input is damaged, `strict` and a malformed line, a threshold out of range, or
            an output folder that belongs to another call.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, got {threshold}")
    files = [Path(path) for path in inputs]
    for path in files:
        open_text(path).close()  # before anything is made
    job = {
        "inputs": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "classifier": classifier.identity,
        "threshold": threshold,
        "keys": [text_key, source_key],
        "min_chars": min_chars,
        "drop_duplicates": drop_duplicates,
    }
    folder = Path(output)
    done = _finished(folder, job)
    if done is not None:
        return done
    work = _Work(folder, job)
    try:
        for chunk in _chunks(files, work, text_key, strict):
            _decide(
                chunk, work, classifier, threshold, text_key, source_key, min_chars, drop_duplicates
            )
            work.save(chunk[-1].file, chunk[-1].number)
            progress(work.report.total)
        return work.finish()
    finally:
        work.close()


@dataclass(frozen=True)
class _Line:
    file: int
    path: Path
    number: int
    raw: bytes
    record: dict[str, Any] | None
    reason: str


def _chunks(files: list[Path], work: _Work, text_key: str, strict: bool) -> Iterator[list[_Line]]:
    """Lines not done yet, a chunk at a time; a chunk never spans two files."""
    for index, path in enumerate(files):
        if index < work.file:
            continue
        chunk: list[_Line] = []
        for number, raw in lines(path, skip=work.line if index == work.file else 0):
            if not raw.strip():
                continue  # an empty line, as at the end of many files, holds no document
            record, reason = parse(raw, text_key)
            if reason and strict:
                raise ValueError(f"{path}:{number}: {reason} (strict): repair or remove the line")
            chunk.append(_Line(index, path, number, raw, record, reason))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _decide(
    chunk: list[_Line],
    work: _Work,
    classifier: Classifier,
    threshold: float,
    text_key: str,
    source_key: str,
    min_chars: int,
    drop_duplicates: bool,
) -> None:
    usable = [line for line in chunk if line.record is not None]
    scores = dict(zip((id(line) for line in usable),
                      classifier.score(line.record[text_key] for line in usable).tolist(),
                      strict=True))  # fmt: skip
    for line in chunk:
        if line.record is None:
            where = {"file": str(line.path), "line": line.number, "reason": line.reason}
            raw = line.raw.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
            work.write("malformed", {**where, "raw": raw}, line.reason)
            continue
        text, score = line.record[text_key], round(scores[id(line)], 6)
        reason = "" if score >= threshold else "score"
        if len(text) < min_chars:
            reason = "short"
        if drop_duplicates and work.seen_before(text):
            reason = "duplicate"
        source = str(line.record.get(source_key, ""))
        record = {**line.record, "ultraclean_score": score}
        if reason:
            work.write("rejected", {**record, "ultraclean_reason": reason}, reason, source)
        else:
            work.write("kept", record, "", source)


class _Work:
    """Outputs under way, and the record of how far they are good."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self.folder, self.job = folder, job
        folder.mkdir(parents=True, exist_ok=True)
        self.report = FilterReport()
        self.file, self.line = 0, 0
        lengths = dict.fromkeys(STREAMS, 0)
        self._seen: set[bytes] = set()
        state = self._load()
        if state is not None:
            self.report = FilterReport(**state["report"])
            self.file, self.line, lengths = state["file"], state["line"], state["lengths"]
        self._out: dict[str, BinaryIO] = {}
        for name in STREAMS:
            stream = self._partial(name).open("r+b" if self._partial(name).exists() else "w+b")
            stream.truncate(lengths[name])
            stream.seek(lengths[name])
            self._out[name] = stream
        if state is not None and job["drop_duplicates"]:
            self._remember()

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl.partial"

    def _load(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        good = state["job"] == self.job and all(
            self._partial(n).exists() and self._partial(n).stat().st_size >= state["lengths"][n]
            for n in STREAMS
        )
        return state if good else None

    def _remember(self) -> None:
        """Read back which texts earlier chunks saw."""
        for name in ("kept", "rejected"):
            for line in self._partial(name).open("rb"):
                self.seen_before(json.loads(line)[self.job["keys"][0]])

    def seen_before(self, text: str) -> bool:
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._seen:
            return True
        self._seen.add(key)
        return False

    def write(self, stream: str, record: dict[str, Any], reason: str, source: str = "") -> None:
        # Lone surrogates are legal in JSON as escapes only.
        text = json.dumps(record, ensure_ascii=False)
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                text = json.dumps(record)
        self._out[stream].write(text.encode("utf-8") + b"\n")
        report = self.report
        report.total += 1
        setattr(report, stream, getattr(report, stream) + 1)
        if stream == "malformed":
            report.malformed_reasons[reason] = report.malformed_reasons.get(reason, 0) + 1
            return
        if reason:
            report.reasons[reason] = report.reasons.get(reason, 0) + 1
        counts = report.by_source.setdefault(source, {"kept": 0, "rejected": 0})
        counts[stream] += 1

    def save(self, file: int, line: int) -> None:
        """Make everything written so far survive a kill."""
        self.file, self.line = file, line
        for stream in self._out.values():
            stream.flush()
            os.fsync(stream.fileno())
        write_json(
            self.folder / "progress.json",
            {
                "job": self.job,
                "file": file,
                "line": line,
                "lengths": {name: stream.tell() for name, stream in self._out.items()},
                "report": asdict(self.report),
            },
        )

    def finish(self) -> FilterReport:
        report = self.report
        assert report.total == report.kept + report.rejected + report.malformed
        for counts in (report.reasons, report.malformed_reasons, report.by_source):
            ordered = dict(sorted(counts.items()))
            counts.clear()
            counts.update(ordered)
        self.close()
        for name in STREAMS:
            os.replace(self._partial(name), self.folder / f"{name}.jsonl")
        write_json(self.folder / "report.json", {"job": self.job, **asdict(report)})
        (self.folder / "progress.json").unlink(missing_ok=True)
        return report

    def close(self) -> None:
        for stream in self._out.values():
            stream.close()


def _finished(folder: Path, job: dict[str, Any]) -> FilterReport | None:
    """The report of a finished equal call; ValueError if the folder holds another call's result."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/report.json is broken ({error}): remove the folder") from None
    if report.pop("job", None) != job:
        raise ValueError(
            f"{folder} holds the result of another call (other inputs, classifier or settings): "
            "choose another output folder, or remove it"
        )
    return FilterReport(**report)
