"""Any number of workers, every packing, Parquet and WARC: the same rows, each accounted for."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from ultraclean import Classifier, filter_corpus, jsonl
from ultraclean.jsonl import blocks
from ultraclean.warc import records

STREAMS = ("kept", "rejected", "malformed")


def dirty_lines(prose: list[str], shuffled: list[str]) -> list[bytes]:
    draw = random.Random(0)
    deep = {"a": [1, None]}
    lines = [json.dumps({"n": i, "text": t, "source": f"s{i % 3}", "deep": deep}).encode()
             for i, t in enumerate((prose + shuffled) * 4)]  # fmt: skip
    bad = [b"{", b"", b"[1]", b'{"text": null}', b'{"x": 1}', b"\xff\xfe", b'{"text": " "}', b"NaN"]
    for _ in range(400):
        lines.insert(draw.randrange(len(lines)), draw.choice(bad))
    lines += lines[:50]  # duplicates
    return lines


@pytest.fixture(scope="module")
def dirty(prose: list[str], shuffled: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dirty") / "in.jsonl"
    path.write_bytes(b"\n".join(dirty_lines(prose, shuffled)))
    return path


@pytest.mark.parametrize("compress", ["", "gz", "zst"])
def test_any_number_of_workers_writes_the_same_bytes(
    compress: str, classifier: Classifier, dirty: Path, tmp_path: Path
) -> None:
    second = tmp_path / "more.jsonl.gz"
    second.write_bytes(gzip.compress(dirty.read_bytes()[:300_000].rpartition(b"\n")[0]))
    outcome = {}
    for workers in (1, 2, 4):
        folder = tmp_path / str(workers)
        report = filter_corpus(
            [dirty, second], folder, classifier, workers=workers, compress=compress,
            drop_duplicates=True, min_chars=210,
        )  # fmt: skip
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}
        outcome[workers] = report.to_dict(), files
    assert outcome[1] == outcome[2] == outcome[4]
    report, files = outcome[1]
    assert report["total"] == report["kept"] + report["rejected"] + report["malformed"] > 7000
    assert set(report["reasons"]) == {"duplicate", "short", "score"}
    unpack = {"": bytes, "gz": gzip.decompress, "zst": unzstd}[compress]
    for name in STREAMS:
        data = unpack(files[f"{name}.jsonl" + (f".{compress}" if compress else "")])
        rows = [json.loads(line) for line in data.splitlines()]
        assert len(rows) == report[name]
        if name != "malformed":
            assert all("ultraclean_score" in r and r["deep"] == {"a": [1, None]} for r in rows)


def unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()


def test_blocks_are_the_file(dirty: Path, tmp_path: Path) -> None:
    data = dirty.read_bytes()[:60_000]
    dirty = tmp_path / "part.jsonl"
    dirty.write_bytes(data)
    for size in (100, 4096, 1 << 20):
        found = list(blocks(dirty, size=size))
        assert b"".join(b.data for b in found) == data
        assert [b.first for b in found] == [
            1 + data[:at].count(b"\n") for at in at_each([len(b.data) for b in found])
        ]
    long = tmp_path / "long.jsonl"
    long.write_bytes(b"a\n" + b"x" * 5000 + b"\nb\n" + b"y" * 3000)
    for size in (64, 1000, 1 << 20):
        lines = [line for b in blocks(long, 1000, size) for line in enumerate(
            b.data.removesuffix(b"\n").split(b"\n"), b.first)]  # fmt: skip
        assert [(n, len(t) if len(t) <= 1000 else "long") for n, t in lines] == [
            (1, 1), (2, "long"), (3, 1), (4, "long")
        ]  # fmt: skip


def at_each(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.fixture(scope="module")
def table(prose: list[str], shuffled: list[str]) -> pa.Table:
    texts = [*prose, *shuffled] * 2
    texts[7], texts[11] = None, "   "
    return pa.table({
        "id": pa.array(range(len(texts)), pa.int64()),
        "text": texts,
        "meta": [{"url": f"u{i}", "tags": ["a"] * (i % 3)} for i in range(len(texts))],
        "when": pa.array([i * 1000 for i in range(len(texts))], pa.timestamp("ms")),
        "source": [f"s{i % 2}" for i in range(len(texts))],
    })  # fmt: skip


def test_parquet_keeps_every_column(
    classifier: Classifier, table: pa.Table, tmp_path: Path
) -> None:
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=700)
    for workers in (1, 3):
        report = filter_corpus(
            [tmp_path / "in.parquet"], tmp_path / str(workers), classifier, workers=workers
        )
    assert report.malformed_reasons == {"'text' is null": 1, "empty": 1}
    for name in STREAMS:
        one, three = (tmp_path / w / f"{name}.parquet" for w in ("1", "3"))
        assert one.read_bytes() == three.read_bytes()
        found = parquet.read_table(one)
        assert len(found) == getattr(report, name) > 0
        ids = found.column("id").to_pylist()
        assert found.select(table.column_names).equals(table.take(ids))
        scores = found.column("ultraclean_score").to_pylist()
        if name == "malformed":
            assert scores == [None, None]
        else:
            texts = table.column("text").take(ids).to_pylist()
            assert scores == pytest.approx(classifier.score(texts).tolist(), abs=1e-6)
            assert all((s >= 0.5) == (name == "kept") for s in scores)
    again = filter_corpus([tmp_path / "1/kept.parquet"], tmp_path / "again", classifier)
    assert again.kept == again.total == report.kept


def test_parquet_killed_anywhere_ends_the_same(
    classifier: Classifier, table: pa.Table, tmp_path: Path
) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pa.concat_tables([table] * 6), path)
    filter_corpus([path], tmp_path / "whole", classifier)
    program = textwrap.dedent(f"""
        import ultraclean, ultraclean.outputs
        ultraclean.outputs.SAVE_SECONDS = 0
        ultraclean.filter_corpus([{str(path)!r}], {str(tmp_path / "killed")!r},
            ultraclean.Classifier.load({str(classifier.folder)!r}), workers=2)
    """)
    record, kills = tmp_path / "killed/progress.json", 0
    for attempt in range(4):
        before = record.stat().st_mtime_ns if record.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", program])
        while process.poll() is None:
            if record.exists() and record.stat().st_mtime_ns != before:
                time.sleep(0.01 * attempt)
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.001)
    assert kills >= 2
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in STREAMS:
        one, other = (tmp_path / w / f"{name}.parquet" for w in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()


def test_parquet_errors(classifier: Classifier, table: pa.Table, tmp_path: Path) -> None:
    parquet.write_table(table.select(["id", "text"]), tmp_path / "a.parquet")
    parquet.write_table(table.select(["id"]), tmp_path / "b.parquet")
    parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "e.jsonl").write_text("{}\n")

    def run(*names: str, **settings) -> None:
        filter_corpus([tmp_path / n for n in names], tmp_path / "out", classifier, **settings)

    for names, message in (
        (["b.parquet"], "has no column 'text', but id"),
        (["a.parquet", "c.parquet"], "other columns"),
        (["d.parquet"], "damaged or no Parquet"),
        (["a.parquet", "e.jsonl"], "several kinds"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*names)
    with pytest.raises(ValueError, match="is int64, not text"):
        run("a.parquet", text_key="id")
    with pytest.raises(ValueError, match="leave compress out"):
        run("a.parquet", compress="gz")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        run("a.parquet", workers=0)
    assert not (tmp_path / "out").exists()


def warc(kind: str, url: str, content: bytes) -> bytes:
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
            f"WARC-Record-ID: <urn:{url}>\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
            f"Content-Length: {len(content)}\r\n\r\n").encode()  # fmt: skip
    return gzip.compress(head + content + b"\r\n\r\n")


def page(text: str, head: bytes = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n") -> bytes:
    body = f"<html><body><nav>menu</nav><article><p>{text}</p></article></body></html>".encode()
    return head + b"\r\n" + (gzip.compress(body) if b"gzip" in head else body)


def test_wet_files(classifier: Classifier, prose: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.warc.wet.gz"
    path.write_bytes(warc("warcinfo", "", b"info") + b"".join(
        warc("conversion", f"http://h{i % 2}.org/{i}", t.encode())
        for i, t in enumerate(prose[:150])
    ) + warc("conversion", "http://h.org/empty", b"  "))  # fmt: skip
    report = filter_corpus([path], tmp_path / "out", classifier, threshold=0.0, workers=2)
    assert (report.kept, report.malformed_reasons) == (150, {"empty": 1})
    rows = [json.loads(line) for line in (tmp_path / "out/kept.jsonl").open()]
    assert [r["text"] for r in rows] == prose[:150]
    assert rows[1]["url"] == "http://h1.org/1" and rows[1]["source"] == "h1.org"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="damaged or cut short"):
        filter_corpus([path], tmp_path / "cut", classifier)
    path.write_bytes(gzip.compress(b"hello\n"))
    with pytest.raises(ValueError, match="is no WARC"):
        filter_corpus([path], tmp_path / "none", classifier)


def test_pages_of_a_warc(classifier: Classifier, prose: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")
    text = " ".join(prose[0].split())
    packed = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n"
    image = b"HTTP/1.1 200 OK\r\nContent-Type: image/x\r\n"
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join([
        warc("request", "http://a.org/", b"GET"),
        warc("response", "http://a.org/", page(text)),
        warc("response", "http://a.org/z", page(text, packed)),
        warc("response", "http://a.org/404", page(text, b"HTTP/1.1 404 No\r\n")),
        warc("response", "http://a.org/i", page("", image)),
    ]))  # fmt: skip
    report = filter_corpus([path], tmp_path / "out", classifier, threshold=0.0)
    assert (report.kept, sorted(report.malformed_reasons)) == (
        2, ["not a page (HTTP status)", "not a page (content type)"]
    )  # fmt: skip
    for line in (tmp_path / "out/kept.jsonl").open():
        found = json.loads(line)["text"]
        assert "menu" not in found and found.split() == text.split()


def test_a_record_without_an_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(gzip.decompress(warc("conversion", "u", b"x" * 9000)) * 2)
    assert [len(r.content) for r in records(path, 100)] == [101, 101]


def test_a_damaged_end_is_noticed_in_every_packing(dirty: Path, tmp_path: Path) -> None:
    data = dirty.read_bytes()
    for suffix, packed in ((".gz", gzip.compress(data)),
                           (".zst", zstandard.ZstdCompressor().compress(data))):  # fmt: skip
        path = tmp_path / f"in.jsonl{suffix}"
        path.write_bytes(packed + packed)  # members and frames may follow one another
        with jsonl.open_text(path) as stream:
            assert stream.read() == data + data
        for cut in (1, 9, len(packed) // 2):
            path.write_bytes(packed[:-cut])
            with pytest.raises(ValueError, match="damaged or cut short"):
                list(blocks(path))
