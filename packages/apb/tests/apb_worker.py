"""One host of a gloo run: prefills and answers with every strategy, writes what it saw.

Started by test_distributed.py. Arguments: folder for results; "die" as a second one ends the last
host in the middle of a prefill, "restart" does so on the first attempt only.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import apb
import testbed

STRATEGIES = ("dense", "ring", "zigzag", "ulysses", "star", "apb", "spava")
SIZES = (1, 2, 3, 4, 8)
OPTIONS = {"apb": {"sink": 2}}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Document and query."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256, (2, 60), generator=generator)
    return ids[:, :53], ids[:, 53:]


def run(group: apb.Group | int, strategy: str) -> dict:
    """What virtual and real hosts must agree on."""
    model = testbed.tiny("llama-gqa3")
    document, query = inputs()
    in_anchor = query if strategy in ("apb", "spava") else None
    context = apb.prefill(
        model, document, strategy=strategy, hosts=group, query=in_anchor,
        **OPTIONS.get(strategy, {}),
    )  # fmt: skip
    return {
        "logits": context.logits(query),
        "greedy": context.generate(query, max_new_tokens=4),
        "sampled": context.generate(query, max_new_tokens=4, temperature=1.0, top_p=0.9, seed=3),
        "bytes": context.report.bytes_sent,
    }


class Dying:
    """A strategy whose host ends without a word in the second layer."""

    name, exact, calls = "dying", False, 0

    def __init__(self, inner: object, rank: int) -> None:
        self.inner, self.rank = inner, rank

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def attend(self, layer):
        """Die, or do what the inner one does."""
        if layer.index == 1 and layer.host.rank == self.rank:
            os._exit(17)
        return self.inner.attend(layer)


def run_all_sizes(folder: Path, rank: int) -> None:
    """Every strategy on the first 1, 2, 3, 4 and on all of the processes."""
    for size in SIZES:
        some = dist.new_group(list(range(size)), timeout=timedelta(seconds=60))
        if rank < size:
            group = apb.DistributedGroup(some)
            found = {strategy: run(group, strategy) for strategy in STRATEGIES}
            torch.save(found, folder / f"{size}.{rank}.pt")


def run_until_restarted(group: apb.DistributedGroup, folder: Path) -> None:
    """The last host dies in the first attempt; the next one says which it was."""
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], group.ranks[0]
    strategy = apb.make_strategy("ring")
    if attempt == "0":
        strategy = Dying(strategy, group.size - 1)
    document, query = inputs()
    apb.prefill(testbed.tiny("llama"), document, strategy=strategy, hosts=group).logits(query)
    (folder / f"attempt{rank}.txt").write_text(attempt, "utf-8")


def main() -> None:
    """One host."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["die"]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        group = apb.DistributedGroup()
        rank = group.ranks[0]
        document, _ = inputs()
        strategy = Dying(apb.make_strategy("ring"), group.size - 1)
        try:
            apb.prefill(testbed.tiny("llama"), document, strategy=strategy, hosts=group)
        except ConnectionError as error:
            (folder / f"error{rank}.txt").write_text(str(error), "utf-8")
        os._exit(0)
    with apb.torchrun_group(timeout=60) as group:
        rank = group.ranks[0]
        if sys.argv[2:] == ["restart"]:
            run_until_restarted(group, folder)
        else:
            run_all_sizes(folder, rank)
        dist.barrier()


if __name__ == "__main__":
    main()
