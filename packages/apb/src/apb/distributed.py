"""Hosts that are processes of torch.distributed: gloo on CPUs, NCCL on GPUs, under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


@contextmanager
def torchrun_group(timeout: float = 600.0) -> Iterator[DistributedGroup]:
    """The processes that torchrun started as hosts: NCCL where there are GPUs, gloo elsewhere.

    torchrun keeps one store for all its attempts, in which the hosts of a restart would find, and
    try, the addresses of those that died. Here each attempt has keys of its own.

    Args:
        timeout: seconds after which a host that does not answer counts as lost.

    Raises:
        ValueError: torchrun did not start this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError("torchrun did not start this process: use VirtualGroup, or start with it")
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank, world_size=size, timeout=limit,
    )  # fmt: skip
    try:
        yield DistributedGroup()
    finally:
        dist.destroy_process_group()


class DistributedGroup:
    """This process as one host of an initialised process group; see `apb.transport.Group`.

    Args:
        group: a process group of torch.distributed; None is the default one. All its processes
            must make theirs.

    Raises:
        ValueError: torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "torch.distributed is not initialised: start with torchrun and call "
                "torch.distributed.init_process_group first, or use VirtualGroup"
            )
        self._group = group
        self.size = dist.get_world_size(group)
        self.ranks = (dist.get_rank(group),)
        if dist.get_backend(group) == "nccl":
            # NCCL wants all of them in the first exchange, and a host may have nothing to exchange.
            dist.barrier(group)

    def run(self, program: Callable[[DistributedHost], Any]) -> dict[int, Any]:
        """Run `program(host)` here; the other processes must do the same."""
        rank = self.ranks[0]
        return {rank: program(DistributedHost(self._group, rank, self.size))}


class DistributedHost:
    """One process; see `apb.transport.Host`."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        self.messages_sent = 0
        self._group = group

    def exchange(
        self,
        sends: Mapping[int, Tensor],
        receives: Mapping[int, tuple[int, ...]],
        like: Tensor,
    ) -> _Exchange:
        """Post all sends and receives, point to point; see `apb.transport.Host`."""
        arrived = {rank: like.new_empty(shape) for rank, shape in receives.items()}
        operations = []
        for rank, tensor in sends.items():
            if tensor.numel():
                tensor = tensor.contiguous()
                operations.append(self._operation(dist.isend, tensor, rank))
                self.bytes_sent += tensor.numel() * tensor.element_size()
                self.messages_sent += 1
        for rank, tensor in arrived.items():
            if tensor.numel():
                operations.append(self._operation(dist.irecv, tensor, rank))
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise self._lost(error) from error
        return _Exchange(self, works, arrived, operations)

    def _operation(self, kind: Any, tensor: Tensor, rank: int) -> dist.P2POp:
        peer = rank if self._group is None else dist.get_global_rank(self._group, rank)
        return dist.P2POp(kind, tensor, peer, self._group)

    def _lost(self, error: RuntimeError) -> ConnectionError:
        return ConnectionError(
            f"host {self.rank} of {self.size} lost the connection to another host: it ended, or "
            "did not answer within the process group's timeout; start all hosts again "
            f"({str(error).splitlines()[0]})"
        )


class _Exchange:
    def __init__(
        self, host: DistributedHost, works: list, arrived: dict[int, Tensor], operations: list
    ) -> None:
        # The operations hold the tensors that are being sent.
        self._host, self._works, self._arrived, self._held = host, works, arrived, operations

    def wait(self) -> dict[int, Tensor]:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise self._host._lost(error) from error
        return self._arrived
