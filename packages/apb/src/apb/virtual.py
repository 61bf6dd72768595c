"""Hosts in one process, one running at a time, so that the time of each can be told.

Every host is a thread that runs the same program as a real one. A baton lets one of them compute;
it goes on when that host has to wait for a message. So a whole prefill costs the sum of all work,
and each host has a clock of its own: its computing time, plus waiting for messages that take
latency + bytes / bandwidth. The largest clock at the end is the critical path on real hosts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class _Abandoned(Exception):
    """Ends the thread of a host whose neighbour failed."""


class VirtualGroup:
    """`size` hosts in this process.

    Args:
        size: number of hosts, at least 1.
        latency: of a message, seconds.
        bandwidth: with which a host sends, bytes / second; messages of one host queue.

    Attributes:
        clocks: for each host, seconds on its own clock, of the last `run`.
        busy: for each host, seconds of them spent computing.
    """

    def __init__(self, size: int, *, latency: float = 0.0, bandwidth: float = float("inf")) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a whole number of hosts, at least 1, got {size!r}")
        if latency < 0 or not bandwidth > 0:
            raise ValueError(
                f"latency must be at least 0 s and bandwidth positive, got {latency}, {bandwidth}"
            )
        self.size = size
        self.ranks = tuple(range(size))
        self.latency = latency
        self.bandwidth = bandwidth
        self.clocks = [0.0] * size
        self.busy = [0.0] * size

    def run(self, program: Callable[[VirtualHost], Any]) -> dict[int, Any]:
        """Run `program(host)` on every host; results by rank.

        An error on one host ends all and is raised here, with the host's rank as a note. Hosts
        that all wait for each other raise RuntimeError.
        """
        self._turn = threading.Condition()
        self._running: int | None = 0
        self._error: BaseException | None = None
        self._done: set[int] = set()
        self._awaited: dict[int, set[int]] = {}
        self._boxes: dict[tuple[int, int], deque[tuple[float, Tensor]]] = {}
        self.clocks, self.busy = [0.0] * self.size, [0.0] * self.size
        results: dict[int, Any] = {}

        def body(host: VirtualHost) -> None:
            try:
                self._until_my_turn(host)
                results[host.rank] = program(host)
            except _Abandoned:
                pass
            except BaseException as error:
                error.add_note(f"on virtual host {host.rank} of {self.size}")
                with self._turn:
                    self._error = self._error or error
            finally:
                host.stop()
                with self._turn:
                    self._done.add(host.rank)
                    self._pass_on(host.rank)

        hosts = [VirtualHost(self, rank) for rank in self.ranks]
        threads = [threading.Thread(target=body, args=(h,), daemon=True) for h in hosts]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: the hosts stop at their next exchange
            with self._turn:
                self._error = self._error or error
                self._turn.notify_all()
            raise
        if self._error is not None:
            raise self._error
        return results

    def _runnable(self, rank: int) -> bool:
        awaited = self._awaited.get(rank, ())
        return rank not in self._done and all(self._boxes.get((s, rank)) for s in awaited)

    def _pass_on(self, rank: int) -> None:
        """Give the baton to the next host that can go on. Called with the lock held."""
        order = [(rank + 1 + i) % self.size for i in range(self.size)]
        self._running = next((r for r in order if self._runnable(r)), None)
        if self._running is None and len(self._done) < self.size and self._error is None:
            waits = {r: sorted(s) for r, s in sorted(self._awaited.items()) if r not in self._done}
            self._error = RuntimeError(f"virtual hosts wait for each other for ever: {waits}")
        self._turn.notify_all()

    def _until_my_turn(self, host: VirtualHost) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == host.rank or self._error is not None)
            if self._error is not None:
                raise _Abandoned
        host.start()


class VirtualHost:
    """One host of a `VirtualGroup`; see `apb.transport.Host`."""

    def __init__(self, group: VirtualGroup, rank: int) -> None:
        self.rank = rank
        self.size = group.size
        self.bytes_sent = 0
        self.messages_sent = 0
        self._group = group
        self._wire_free = 0.0
        self._began: float | None = None

    def start(self) -> None:
        """Let this host's clock run."""
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Stop this host's clock, once a GPU has done what this host gave it to do."""
        if self._began is not None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - self._began
            self._group.clocks[self.rank] += seconds
            self._group.busy[self.rank] += seconds
            self._began = None

    def exchange(
        self,
        sends: Mapping[int, Tensor],
        receives: Mapping[int, tuple[int, ...]],
        like: Tensor,
    ) -> _Exchange:
        """Put messages into the boxes of their receivers; see `apb.transport.Host`."""
        self.stop()
        group = self._group
        with group._turn:
            for rank, tensor in sends.items():
                if not tensor.numel():
                    continue
                size = tensor.numel() * tensor.element_size()
                now = max(self._wire_free, group.clocks[self.rank])
                self._wire_free = now + size / group.bandwidth
                box = group._boxes.setdefault((self.rank, rank), deque())
                box.append((self._wire_free + group.latency, tensor))
                self.bytes_sent += size
                self.messages_sent += 1
        self.start()
        return _Exchange(self, dict(receives), like)

    def _collect(self, receives: Mapping[int, tuple[int, ...]], like: Tensor) -> dict[int, Tensor]:
        group = self._group
        wanted = {rank for rank, shape in receives.items() if 0 not in shape}
        self.stop()
        group._awaited[self.rank] = wanted
        if not group._runnable(self.rank):
            with group._turn:
                group._pass_on(self.rank)
            group._until_my_turn(self)
            self.stop()
        group._awaited[self.rank] = set()
        arrived = {rank: like.new_empty(shape) for rank, shape in receives.items()}
        for rank in wanted:
            when, tensor = group._boxes[rank, self.rank].popleft()
            if tensor.shape != receives[rank] or tensor.dtype != like.dtype:
                raise RuntimeError(
                    f"host {self.rank} expected {tuple(receives[rank])} of {like.dtype} from host "
                    f"{rank}, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
            group.clocks[self.rank] = max(group.clocks[self.rank], when)
            arrived[rank] = tensor
        self.start()
        return arrived


class _Exchange:
    def __init__(
        self, host: VirtualHost, receives: Mapping[int, tuple[int, ...]], like: Tensor
    ) -> None:
        self._host, self._receives, self._like = host, receives, like

    def wait(self) -> dict[int, Tensor]:
        return self._host._collect(self._receives, self._like)
