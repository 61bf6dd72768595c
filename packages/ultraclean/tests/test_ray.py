"""datatrove's blocks on a local Ray cluster: what they write there is what they write locally."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pytest.importorskip("ray", reason="Ray is not there: pip install 'minicpm4-ultraclean[ray]'")

import ray
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from ultraclean import Classifier
from ultraclean.datatrove_blocks import (
    UltraCleanDecontamination,
    UltraCleanFilter,
    UltraCleanMinhashSignature,
    UltraCleanNormaliser,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One node of two processors; its workers are processes that get the blocks pickled."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

    def ends_when_told() -> None:
        # datatrove forks a pool in Ray's worker and ends it by SIGTERM. Ray's handler, which the
        # children inherit, may leave one waiting for a lock, and the actor for that child, forever.
        import signal

        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))

    ray.init(
        runtime_env={"worker_process_setup_hook": ends_when_told},
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
        _memory=1 << 30, _temp_dir=str(tmp_path_factory.mktemp("ray", numbered=True)),
    )  # fmt: skip
    yield
    ray.shutdown()


def test_blocks_on_a_local_ray_cluster(
    cluster: None, classifier: Classifier, prose: list[str], shuffled: list[str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for part in range(2):
        texts = prose[part:90:2] + shuffled[part:90:2]
        (tmp_path / "in" / f"{part}.jsonl").write_text(
            "".join(json.dumps({"text": t, "id": f"{part}-{i}"}) + "\n"
                    for i, t in enumerate(texts))
        )  # fmt: skip

    def written(name: str, executor: type, **resources) -> dict[str, list]:
        out = tmp_path / name

        def writer(folder: str) -> JsonlWriter:
            return JsonlWriter(str(out / folder), compression=None)

        executor(
            pipeline=[
                JsonlReader(str(tmp_path / "in")),
                UltraCleanDecontamination([prose[5]], ngrams=8,
                                          exclusion_writer=writer("contaminated")),
                UltraCleanFilter(classifier.folder, 0.5, writer("dropped")),
                UltraCleanNormaliser("ultrafine-words"),
                writer("kept"),
            ],
            tasks=2, workers=2, logging_dir=str(out / "logs"), **resources,
        ).run()  # fmt: skip
        executor(
            pipeline=[
                JsonlReader(str(tmp_path / "in")), UltraCleanMinhashSignature(str(out / "minhash"))
            ],
            tasks=2, workers=2, logging_dir=str(out / "logs-minhash"),
            **resources,
        ).run()  # fmt: skip
        assert len(list((out / "logs" / "completions").iterdir())) == 2
        return {
            str(file.relative_to(out)): file.read_bytes()
            for folder in ("kept", "dropped", "contaminated", "minhash")
            for file in sorted((out / folder).rglob("*"))
            if file.is_file()
        }

    # One actor runs both ranks: starting another takes longer than all else here.
    there = written("ray", RayPipelineExecutor, mem_per_cpu_gb=0.2, tasks_per_job=2)
    here = written("local", LocalPipelineExecutor)
    assert there == here
    rows = [line for name, data in here.items() if "minhash" not in name
            for line in data.splitlines()]  # fmt: skip
    assert len(rows) == 180
    assert sum(name.startswith("minhash") for name in here) == 2 * 14
    assert any(name.startswith("contaminated") for name in here)
