"""One of four gloo processes that time apb's prefix exchange against all_gather, in turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import harness  # first: it keeps `import apb` from finding the benchmark
import torch
import torch.distributed as dist

import apb

MEBIBYTES, REPEATS = 16, 9


def main() -> None:
    """Time both on all ranks; rank 0 writes the slowest rank's seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = apb.DistributedGroup()
    rank, size = group.ranks[0], group.size
    own = torch.full((MEBIBYTES * 2**18,), float(rank))
    gathered = torch.empty(size * own.numel())

    counted: list[int] = []
    arrived: dict[int, torch.Tensor] = {}

    def ours(host: apb.Host) -> None:
        later = dict.fromkeys(range(rank + 1, size), own)
        earlier = {r: tuple(own.shape) for r in range(rank)}
        arrived.update(host.exchange(later, earlier, own).wait())
        counted.append(host.bytes_sent)

    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(REPEATS + 1):
        for side, call in (
            ("ours", lambda: group.run(ours)),
            ("peer", lambda: dist.all_gather_into_tensor(gathered, own)),
        ):
            dist.barrier()
            slowest = torch.tensor(harness.wall_seconds(call))
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn:  # the first checks and warms up
                seconds[side].append(slowest.item())
        # Both brought what each rank holds.
        for r, x in {**arrived, **dict(enumerate(gathered.split(own.numel())))}.items():
            assert bool((x == r).all()), f"rank {r}'s tensor came wrong"
    assert len(set(counted)) == 1
    per_rank: list[int] = [0] * size
    dist.all_gather_object(per_rank, counted[0])
    if rank == 0:
        result = {**seconds, "bytes": per_rank}
        (Path(sys.argv[1]) / "result.json").write_text(json.dumps(result), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
