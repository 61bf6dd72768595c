"""Signatures against a plain MinHash and true Jaccard similarity, clusters, decontamination."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ultraclean import Classifier, Decontaminator, MinHasher, deduplicate, filter_corpus
from ultraclean.minhash import clusters


def words(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(n)]


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    found = text.lower().split()
    return {tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}


def test_minima_agree_as_often_as_texts_are_alike() -> None:
    """The estimate of the similarity is within its own sampling error: 5 of 4096 functions'."""
    hasher = MinHasher(bands=512, rows=8)
    base = words(400, 0)
    for changed in (0, 3, 10, 30, 90, 400):
        other = list(base)
        for i in random.Random(changed).sample(range(400), changed):
            other[i] = words(1, 1000 + i)[0]
        a, b = shingles(" ".join(base)), shingles(" ".join(other))
        true = len(a & b) / len(a | b)
        s, _ = hasher.signatures([" ".join(base), " ".join(other)])
        error = np.sqrt(max(true * (1 - true), 1e-9) / s.shape[1])
        assert abs((s[0] == s[1]).mean() - true) <= 5 * error, (changed, true)


def test_minima_are_the_least_of_what_the_functions_say() -> None:
    """One n-gram: a·h + b. Two texts of one n-gram each: the least of a text with both."""
    hasher = MinHasher(bands=3, rows=5, ngrams=2)
    both, one, two = hasher.signatures(["p q r", "p q", "q r"])[0]
    assert (both == np.minimum(one, two)).all()
    assert len(set(one.tolist())) == 15
    assert (hasher.signatures(["", " .,"])[0] == 0xFFFFFFFF).all()


def test_case_accents_and_punctuation_do_not_count(prose: list[str]) -> None:
    hasher = MinHasher()
    for a, b in (("The café, №!", "the CAFE no"), ("中文字", "中 文 字"), ("a\n\tb", "a b")):
        s, content = hasher.signatures([a, b])
        assert (s[0] == s[1]).all() and content[0] == content[1]
    alike = {" ".join(re.findall(r"[^\W_]+", p.lower())) for p in prose}
    assert len(set(hasher.signatures(prose)[1].tolist())) == len(alike)


def test_levels_agree(prose: list[str]) -> None:
    program = (
        "import hashlib, pydoc_data.topics as t, ultraclean\n"
        "from ultraclean import native\n"
        "s, _ = ultraclean.MinHasher().signatures(list(t.topics.values()))\n"
        "print(native.library()[0].level, hashlib.sha256(s.tobytes()).hexdigest())"
    )
    found = {}
    for level in ("scalar", "avx2", "avx512", ""):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={"ULTRACLEAN_CPU_LEVEL": level, "PATH": ""},
            check=True,
        )
        name, digest = done.stdout.split()
        found[name] = digest
    assert "scalar" in found and len(set(found.values())) == 1


def test_clusters_join_what_is_joined() -> None:
    bands = np.array([[1, 9], [2, 8], [1, 8], [3, 7], [4, 7], [5, 6]], np.uint64)
    assert clusters(bands).tolist() == [0, 0, 0, 3, 3, 5]
    assert clusters(np.zeros((0, 3), np.uint64)).tolist() == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, int]]:
    """120 texts, each followed somewhere by copies of known likeness."""
    draw, rows, origin = random.Random(0), [], {}
    for i in range(120):
        base = words(300, i)
        rows.append({"id": len(rows), "text": " ".join(base)})
        for changed in (0, 2, 100):
            copy = list(base)
            for k in draw.sample(range(300), changed):
                copy[k] = "zz"
            if changed < 100:
                origin[len(rows)] = len(rows) - (1 if changed == 0 else 2)
            rows.append({"id": len(rows), "text": " ".join(copy)})
    path = tmp_path_factory.mktemp("dedup") / "in.jsonl"
    path.write_text("{broken\n" + "".join(json.dumps(r) + "\n" for r in rows))
    return path, origin


def test_near_duplicates_are_set_aside_with_whose_copy_they_are(
    corpus: tuple[Path, dict[int, int]], tmp_path: Path
) -> None:
    path, origin = corpus
    reports = [deduplicate([path], tmp_path / str(w), workers=w) for w in (1, 3)]
    assert reports[0] == reports[1]
    for name in ("kept", "rejected", "malformed"):
        one, three = ((tmp_path / w / f"{name}.jsonl").read_bytes() for w in ("1", "3"))
        assert one == three
    found = [json.loads(line) for line in (tmp_path / "1/rejected.jsonl").open()]
    assert {r["id"] for r in found} == set(origin)
    for row in found:  # the broken line is the first, and rows count from 1
        assert row["ultraclean_reason"] == f"near-duplicate of {path}:{origin[row['id']] + 2}"
    assert reports[0].total == 481 and reports[0].clusters == 120 and reports[0].malformed == 1
    kept = [json.loads(line) for line in (tmp_path / "1/kept.jsonl").open()]
    assert kept[0] == json.loads(path.read_text().splitlines()[1])
    with pytest.raises(FileExistsError, match="choose another output folder"):
        deduplicate([path], tmp_path / "1")


def test_decontamination(classifier: Classifier, prose: list[str], tmp_path: Path) -> None:
    long = [p for p in prose if len(p.split()) > 40]
    known = Decontaminator(long[:20])
    assert known.contaminated(long[:20]) == [True] * 20
    quoted = ["X " + " ".join(long[3].upper().split()[5:18]) + " y", " ".join(long[3].split()[:12])]
    assert known.contaminated(quoted) == [True, False]
    assert known.contaminated([]) == [] and known.contaminated([""]) == [False]
    thirteen = {tuple(t.split()[i : i + 13]) for t in long[:20] for i in range(len(t.split()) - 12)}
    others = [t for t in long[20:] if not thirteen & shingles_of(t)]
    assert sum(known.contaminated(others)) <= len(others) * 0.1  # punctuation apart, some are equal
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*long[:20], "short one"]))
    report = filter_corpus([path], tmp_path / "out", classifier, threshold=0, evaluations=known)
    assert report.reasons == {"contaminated": 20} and report.kept == 1
    with pytest.raises(ValueError, match="result of another call"):
        filter_corpus([path], tmp_path / "out", classifier, threshold=0)


def shingles_of(text: str) -> set[tuple[str, ...]]:
    found = text.split()
    return {tuple(found[i : i + 13]) for i in range(len(found) - 12)}


@pytest.mark.parametrize("bad", [{"bands": 0}, {"rows": 0}, {"ngrams": -1}])
def test_bad_sizes(bad: dict) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        MinHasher(**bad)
