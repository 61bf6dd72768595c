"""Every line is accounted for; a killed filter ends like one that was not."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ultraclean import Classifier, filter_corpus, outputs, thresholds_for_corpus

SCRIPT = Path(sys.executable).parent / "ultraclean"


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def test_splits_by_score_and_keeps_every_column(
    classifier: Classifier, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    records = [{"text": t, "source": "good", "n": i} for i, t in enumerate(prose[:700])]
    records += [{"text": t, "source": "bad", "n": -i} for i, t in enumerate(shuffled[:600])]
    report = filter_corpus([write(tmp_path / "in.jsonl", records)], tmp_path / "out", classifier)
    kept, rejected = read(tmp_path / "out/kept.jsonl"), read(tmp_path / "out/rejected.jsonl")
    assert (report.kept, report.rejected, report.total) == (len(kept), len(rejected), 1300)
    assert {k: v for k, v in kept[0].items() if k != "ultraclean_score"} == records[0]
    scores = classifier.score(r["text"] for r in [*kept, *rejected])
    assert [r["ultraclean_score"] for r in [*kept, *rejected]] == pytest.approx(scores, abs=1e-6)
    assert min(r["ultraclean_score"] for r in kept) >= 0.5
    assert max(r["ultraclean_score"] for r in rejected) < 0.5
    by_source = report.by_source
    assert by_source["good"]["kept"] + by_source["bad"]["kept"] == len(kept)
    assert not list((tmp_path / "out").glob("*.partial"))


DIRTY = st.lists(
    st.one_of(
        st.builds(lambda t: json.dumps({"text": t, "source": "s"}).encode(), st.text(max_size=30)),
        st.sampled_from([
            b"{",
            b"[]", b'{"text": null}', b'{"text": 3}', b'{"other": "x"}', b'"text"', b"\xff\xfe",
            b'{"text": "  "}', b'{"text": "\xe4"}', b'{"text": "a\\ud800"}', b"[" * 5000, b"NaN",
            b'{"text": "one two", "source": null}', b'{"text": "one two", "deep": {"a": [1]}}',
        ]),
        st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\0", b"x")),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(raw=DIRTY, duplicates=st.booleans())
def test_counts_are_conserved_on_any_input(
    classifier: Classifier,
    tmp_path_factory: pytest.TempPathFactory,
    raw: list[bytes],
    duplicates: bool,
) -> None:
    whole = b"\n".join(raw)
    assume(not whole.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")))  # refused: compressed
    folder = tmp_path_factory.mktemp("dirty")
    (folder / "in.jsonl").write_bytes(whole)
    report = filter_corpus(
        [folder / "in.jsonl"], folder / "out", classifier, drop_duplicates=duplicates, min_chars=4
    )
    lines = sum(bool(line.strip()) for line in raw)
    assert report.total == report.kept + report.rejected + report.malformed == lines
    assert sum(report.reasons.values()) == report.rejected
    assert sum(report.malformed_reasons.values()) == report.malformed
    for name in ("kept", "rejected", "malformed"):
        assert len(read(folder / "out" / f"{name}.jsonl")) == getattr(report, name)


def test_malformed_lines_say_where_and_why(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(
        b'{"text": "fine text"}\n{"text"\n\n{"text": 1}\n\xff\n{}\n'
    )
    filter_corpus([tmp_path / "in.jsonl"], tmp_path / "out", classifier)
    rows = [(r["line"], r["reason"]) for r in read(tmp_path / "out/malformed.jsonl")]
    assert rows == [
        (2, "bad JSON"), (4, "'text' is not a string"), (5, "invalid UTF-8"), (6, "no key 'text'")
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"in.jsonl:2: bad JSON \(strict\)"):
        filter_corpus([tmp_path / "in.jsonl"], tmp_path / "strict", classifier, strict=True)


def test_reasons(classifier: Classifier, prose: list[str], tmp_path: Path) -> None:
    records = [{"text": prose[0]}, {"text": prose[0]}, {"text": "short"}]
    path = write(tmp_path / "in.jsonl", records)
    report = filter_corpus(
        [path], tmp_path / "out", classifier, min_chars=10, drop_duplicates=True, threshold=0.0
    )
    assert report.reasons == {"duplicate": 1, "short": 1}
    assert report.kept == 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_input_gives_the_same(
    classifier: Classifier, prose: list[str], tmp_path: Path, suffix: str
) -> None:
    data = "".join(json.dumps({"text": t}) + "\n" for t in prose[:50]).encode()
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(packed(data))
    report = filter_corpus([path], tmp_path / "out", classifier)
    assert report.total == 50
    if suffix:
        path.write_bytes(packed(data)[:-200])
        with pytest.raises(ValueError, match="damaged or cut short"):
            filter_corpus([path], tmp_path / "again", classifier)


def test_killed_anywhere_it_ends_byte_for_byte_the_same(
    classifier: Classifier, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    records = [{"text": t, "n": i} for i, t in enumerate((prose + shuffled) * 12)]
    path = write(tmp_path / "in.jsonl", records)
    filter_corpus([path], tmp_path / "whole", classifier, drop_duplicates=True)
    program = textwrap.dedent(f"""
        import ultraclean, ultraclean.outputs
        ultraclean.outputs.SAVE_SECONDS = 0  # so that each kill finds something to go on from
        ultraclean.filter_corpus([{str(path)!r}], {str(tmp_path / "killed")!r},
            ultraclean.Classifier.load({str(classifier.folder)!r}), drop_duplicates=True)
    """)
    record = tmp_path / "killed" / "progress.json"

    def stamp() -> int:
        return record.stat().st_mtime_ns if record.exists() else 0

    kills = 0
    for attempt in range(6):  # each gets some chunks further than the last
        before = stamp()
        process = subprocess.Popen([sys.executable, "-c", program])
        while process.poll() is None and stamp() == before:
            time.sleep(0.002)
        time.sleep(0.01 * attempt)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in ("kept", "rejected", "malformed"):
        whole = (tmp_path / "whole" / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "killed" / f"{name}.jsonl").read_bytes() == whole
    assert len(os.listdir(tmp_path / "killed")) == 4


def test_a_finished_folder_is_not_redone_nor_overwritten(
    classifier: Classifier, prose: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", [{"text": t} for t in prose[:20]])
    first = filter_corpus([path], tmp_path / "out", classifier)
    stamp = (tmp_path / "out/kept.jsonl").stat().st_mtime_ns
    assert filter_corpus([path], tmp_path / "out", classifier) == first
    assert (tmp_path / "out/kept.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="result of another call"):
        filter_corpus([path], tmp_path / "out", classifier, threshold=0.9)


def test_missing_and_binary_inputs(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl does not exist"):
        filter_corpus([tmp_path / "nowhere.jsonl"], tmp_path / "out", classifier)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        filter_corpus([tmp_path], tmp_path / "out", classifier)
    assert not (tmp_path / "out").exists()
    (tmp_path / "b.jsonl").write_bytes(b"\x7fELF\0\0\0")
    with pytest.raises(ValueError, match="is a binary file"):
        filter_corpus([tmp_path / "b.jsonl"], tmp_path / "out", classifier)
    with pytest.raises(ValueError, match="threshold must be in 0..1"):
        filter_corpus([], tmp_path / "out", classifier, threshold=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "nowhere", "in.jsonl", "-o", "out"], "nowhere is not a classifier"),
        (["score", "CLASSIFIER", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["score", "CLASSIFIER", "nowhere.jsonl", "-o", "out"], "nowhere.jsonl does not exist"),
        (["train", "a.jsonl", "--negatives", "a.jsonl", "-o", "x", "--dim", "0"], "dim must be"),
    ],
)
def test_command_ends_with_one_line_and_code_2(
    classifier: Classifier, tmp_path: Path, arguments: list[str], message: str
) -> None:
    arguments = [a.replace("CLASSIFIER", str(classifier.folder)) for a in arguments]
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_folder_is_held_against_a_second_run(
    classifier: Classifier, prose: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", [{"text": prose[0]}])
    with (
        outputs.only_run(tmp_path / "out"),
        pytest.raises(ValueError, match="another run is writing into"),
    ):
        filter_corpus([path], tmp_path / "out", classifier)


def test_start_over_and_strangers_files(
    classifier: Classifier, prose: list[str], tmp_path: Path
) -> None:
    path, out = write(tmp_path / "in.jsonl", [{"text": t} for t in prose[:20]]), tmp_path / "out"
    filter_corpus([path], out, classifier)
    (out / "mine.txt").write_text("stays")
    assert filter_corpus([path], out, classifier, threshold=0, resume=False).kept == 20
    assert (out / "mine.txt").read_text() == "stays"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/kept.jsonl").write_text("precious\n")
    with pytest.raises(ValueError, match=r"kept.jsonl is not ours"):
        filter_corpus([path], tmp_path / "foreign", classifier)
    assert (tmp_path / "foreign/kept.jsonl").read_text() == "precious\n"


def test_strict_names_the_line(classifier: Classifier, prose: list[str], tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": prose[0]}) + "\n\n{broken\n")
    with pytest.raises(ValueError, match=r"in.jsonl:3: bad JSON \(strict\)"):
        filter_corpus([path], tmp_path / "out", classifier, strict=True)


def test_a_line_without_end_does_not_fill_the_memory(
    classifier: Classifier, prose: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": prose[0], "n": 1}) + "\n"
    )
    report = filter_corpus([path], tmp_path / "out", classifier, threshold=0, max_bytes=4096)
    assert (report.kept, report.malformed_reasons) == (1, {"too long": 1})
    assert (tmp_path / "out/malformed.jsonl").stat().st_size < 2000


def test_budget_ignores_malformed_lines_and_what_heuristics_drop(
    classifier: Classifier, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    records = [{"text": t} for t in (prose + shuffled)[:300]]
    path = write(tmp_path / "in.jsonl", [*records, *records, {"text": "short"}])
    path.write_text("{broken\n" + path.read_text())
    rules = {"min_chars": 20, "drop_duplicates": True}
    threshold = thresholds_for_corpus([path], classifier, [0.4], **rules)[0]
    report = filter_corpus([path], tmp_path / "out", classifier, threshold=threshold, **rules)
    assert report.malformed == 1 and report.reasons["duplicate"] >= 300
    kept = [json.loads(x) for x in (tmp_path / "out/kept.jsonl").read_text().splitlines()]
    # Brute force: the share of characters at this threshold, and at the next higher one.
    texts = {r["text"] for r in records}
    total, chars = sum(map(len, texts)), [len(k["text"]) for k in kept]
    worst = min(k["ultraclean_score"] for k in kept)
    above = sum(len(k["text"]) for k in kept if k["ultraclean_score"] > worst)
    assert above / total < 0.4 <= sum(chars) / total
    (tmp_path / "none.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match="no usable text on 1 lines"):
        thresholds_for_corpus([tmp_path / "none.jsonl"], classifier, [0.4])


def test_report_shows_the_surest_and_the_closest(
    classifier: Classifier, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "in.jsonl", [{"text": t} for t in prose[:99] + shuffled[:99]])
    report = filter_corpus([path], tmp_path / "out", classifier, min_chars=10)
    kept, dropped = (
        sorted(
            json.loads(line)["ultraclean_score"]
            for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()
        )
        for name in ("kept", "rejected")
    )
    shown = {name: [e["score"] for e in found] for name, found in report.examples.items()}
    assert shown == {
        "kept, surest": kept[-3:][::-1],
        "kept, barely": kept[:3],
        "dropped, barely": dropped[-3:][::-1],
        "dropped, surest": dropped[:3],
    }


def test_many_sources_are_counted_together(classifier: Classifier, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"text": "one", "source": str(i)} for i in range(1500)])
    report = filter_corpus([path], tmp_path / "out", classifier, threshold=0)
    assert len(report.by_source) == 1001
    assert report.by_source["(other sources)"]["kept"] == 500


def test_commands_on_dirty_files(
    classifier: Classifier, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        return subprocess.run(
            [SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True
        ).stdout

    folder = str(classifier.folder)
    write(tmp_path / "good.jsonl", [{"text": t, "source": "a"} for t in prose[100:200]])
    write(tmp_path / "bad.jsonl", [{"text": t, "source": "b"} for t in shuffled[100:200]])
    (tmp_path / "dirty.jsonl").write_text((tmp_path / "good.jsonl").read_text() + "{broken\n")
    done = json.loads(run("score", folder, "dirty.jsonl", "bad.jsonl", "-o", "half",
                          "--keep", "0.5", "--json"))  # fmt: skip
    assert done["malformed_reasons"] == {"bad JSON": 1}
    assert 90 <= done["kept"] <= 110 and done["threshold"] != 0.5
    facts = json.loads(run("eval", folder, "--positives", "good.jsonl",
                           "--negatives", "bad.jsonl", "--json"))  # fmt: skip
    assert facts["f1_95"][0] <= facts["f1"] <= facts["f1_95"][1]
    assert {(row["source"], row["texts"]) for row in facts["sources"]} == {("a", 100), ("b", 100)}
    assert "words that speak against" in run("inspect", folder)
    refused = subprocess.run([SCRIPT, "score", folder, "dirty.jsonl"],
                             capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert refused.returncode == 2 and "dirty.jsonl:101: bad JSON" in refused.stderr
    scores = run("score", folder, "bad.jsonl").split()
    expected = classifier.score(json.loads(x)["text"] for x in (tmp_path / "bad.jsonl").open())
    assert [float(s) for s in scores] == pytest.approx(expected.tolist(), abs=1e-6)
    table = json.loads(run("calibrate", folder, "dirty.jsonl", "bad.jsonl", "--keep", "0.5",
                           "--json"))  # fmt: skip
    assert table["thresholds"]["0.5"] == done["threshold"]
    assert "12 texts" in run("inspect", "half", "--samples", "1") or "texts" in run(
        "inspect", "half"
    )
    page = (tmp_path / "half/inspect.html").read_text()
    assert page.count("<details>") >= 4 and "<script" not in page
