"""The blocks in real datatrove pipelines, on its local executor."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from ultraclean import Classifier
from ultraclean.datatrove_blocks import (
    UltraCleanDecontamination,
    UltraCleanFilter,
    UltraCleanMinhashSignature,
    UltraCleanNormaliser,
)


def write(folder: Path, parts: list[list[str]]) -> None:
    folder.mkdir()
    for number, texts in enumerate(parts):
        (folder / f"{number}.jsonl").write_text(
            "".join(
                json.dumps({"text": t, "id": f"{number}-{i}"}) + "\n" for i, t in enumerate(texts)
            )
        )


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.rglob("*.jsonl")) for line in file.open()]


def writer(path: Path) -> JsonlWriter:
    return JsonlWriter(str(path), compression=None)


def test_a_pipeline_on_two_workers(
    classifier: Classifier, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "in", [prose[:60] + shuffled[:60], prose[60:120] + shuffled[60:120]])
    block = UltraCleanFilter(classifier.folder, 0.5, writer(tmp_path / "dropped"))
    block.filter_batch([])  # opened, and it still pickles to a few bytes
    assert len(pickle.dumps(block)) < 10_000
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(tmp_path / "in")),
            UltraCleanDecontamination([prose[5]], ngrams=8),
            block,
            writer(tmp_path / "kept"),
        ],
        tasks=2, workers=2, logging_dir=str(tmp_path / "logs"), skip_completed=False,
    ).run()  # fmt: skip
    kept, dropped = read(tmp_path / "kept"), read(tmp_path / "dropped")
    assert len(kept) + len(dropped) in range(236, 240)  # one quoted passage, and who quotes it
    assert prose[5] not in [r["text"] for r in kept + dropped]
    for row in [*kept, *dropped]:
        score = row["metadata"]["ultraclean_score"]
        assert score == pytest.approx(classifier.score([row["text"]])[0], abs=1e-6)
    assert min(r["metadata"]["ultraclean_score"] for r in kept) >= 0.5
    assert max(r["metadata"]["ultraclean_score"] for r in dropped) < 0.5
    assert {r["metadata"]["filter_reason"] for r in dropped} == {"score"}


def test_normaliser_block(tmp_path: Path) -> None:
    write(tmp_path / "in", [["A  b\nC"]])
    LocalPipelineExecutor(
        pipeline=[JsonlReader(str(tmp_path / "in")), UltraCleanNormaliser("ultrafine-words"),
                  writer(tmp_path / "out")],
        tasks=1, logging_dir=str(tmp_path / "logs"),
    ).run()  # fmt: skip
    assert read(tmp_path / "out")[0]["text"] == "a b \\n c"
    with pytest.raises(ValueError, match="unknown normaliser"):
        UltraCleanNormaliser("nothing")


def test_signatures_go_through_datatrove_s_own_stages(prose: list[str], tmp_path: Path) -> None:
    texts = [p for p in prose if len(p.split()) > 30][:60]
    write(tmp_path / "in", [texts, [t.upper() for t in texts[:10]] + ["unlike any other text"]])
    signatures = UltraCleanMinhashSignature(str(tmp_path / "sig"))
    config, base = signatures.config, str(tmp_path)
    reader = JsonlReader(str(tmp_path / "in"))
    steps = [
        (2, [reader, signatures]),
        (
            config.num_buckets,
            [MinhashDedupBuckets(f"{base}/sig", f"{base}/buckets", config=config)],
        ),
        (1, [MinhashDedupCluster(f"{base}/buckets", f"{base}/remove", config=config)]),
        (2, [reader, MinhashDedupFilter(f"{base}/remove"), writer(tmp_path / "kept")]),
    ]
    for number, (tasks, pipeline) in enumerate(steps):
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, logging_dir=f"{base}/logs{number}"
        ).run()
    kept = [r["text"].lower() for r in read(tmp_path / "kept")]
    assert len(kept) == len(set(kept)) == len({t.lower() for t in texts}) + 1
