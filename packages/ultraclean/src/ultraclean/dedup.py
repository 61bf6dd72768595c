"""Near-duplicates of a corpus: the first of each cluster stays, the others name it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ultraclean._files import atomic_path, write_json
from ultraclean.filter import format_of
from ultraclean.jsonl import LONGEST
from ultraclean.minhash import MinHasher, clusters
from ultraclean.ordered import ahead, in_order
from ultraclean.outputs import STREAMS


@dataclass(frozen=True)
class DedupReport:
    """What became of every row: total = kept + near_duplicates + malformed."""

    total: int
    kept: int
    near_duplicates: int
    malformed: int
    clusters: int
    """Clusters of more than one row."""


def deduplicate(
    inputs: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    bands: int = 14,
    rows: int = 8,
    ngrams: int = 5,
    seed: int = 1,
    text_key: str = "text",
    compress: str = "",
    workers: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> DedupReport:
    """Write kept, rejected and malformed rows and `report.json` into a folder, atomically.

    Reads the inputs twice, and holds 8 · bands bytes for each text in between. The outputs do not
    depend on the number of workers. A rejected row's `ultraclean_reason` is `near-duplicate of
    FILE:ROW`.

    Args:
        inputs, text_key, compress, workers, progress: as for `filter_corpus`.
        output: folder; must not exist.
        bands, rows, ngrams, seed: see `MinHasher`.

    Raises:
        FileExistsError: the output folder exists.
        FileNotFoundError, ValueError: as `filter_corpus`.
    """
    folder = Path(output)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another output folder, or remove it")
    files = [Path(path) for path in inputs]
    form = format_of(files, text_key, "source", LONGEST, compress)
    hasher = MinHasher(bands, rows, ngrams, seed)
    placed = ((path, block) for path in files for block in form.blocks(path))

    def signed(item: tuple) -> tuple[Path, list[int], np.ndarray]:
        path, block = item
        found = form.parse(block)
        usable = [i for i, problem in enumerate(found.problems) if not problem]
        signatures, _ = hasher.signatures([found.texts[i] for i in usable])
        return path, [found.numbers[i] for i in usable], hasher.band_hashes(signatures)

    where: list[tuple[Path, int]] = []
    parts: list[np.ndarray] = [np.zeros((0, bands), np.uint64)]
    for path, numbers, hashes in in_order(ahead(placed, workers), signed, workers):
        where += [(path, number) for number in numbers]
        parts.append(hashes)
        progress(len(where))
    leaders = clusters(np.concatenate(parts))
    counts = dict.fromkeys(STREAMS, 0)
    place = 0
    with atomic_path(folder) as made:
        made.mkdir()
        partial = {name: made / f"{name}.partial" for name in STREAMS}
        out = {name: path.open("wb") for name, path in partial.items()}
        for stream in out.values():
            stream.write(form.header())
        for path in files:
            for block in form.blocks(path):
                found = form.parse(block)
                reasons = []
                for problem in found.problems:
                    if problem:
                        counts["malformed"] += problem != "blank"
                        reasons.append("")
                        continue
                    leader = int(leaders[place])
                    of = "" if leader == place else "near-duplicate of {}:{}".format(*where[leader])
                    counts["rejected" if of else "kept"] += 1
                    reasons.append(of)
                    place += 1
                packed = form.render(path, found, [None] * len(reasons), reasons)
                for name, data in packed.items():
                    out[name].write(data)
        for name, stream in out.items():
            stream.close()
            form.finish(partial[name], made / f"{name}{form.suffix}")
        report = DedupReport(
            total=sum(counts.values()),
            kept=counts["kept"],
            near_duplicates=counts["rejected"],
            malformed=counts["malformed"],
            clusters=int((np.bincount(leaders, minlength=1) > 1).sum()),
        )
        write_json(made / "report.json", asdict(report))
    return report
