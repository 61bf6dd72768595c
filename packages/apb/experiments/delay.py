"""Added latency for a network namespace where the kernel has no netem: frames wait in this process.

A host's cable is cut and both ends are TAP devices: what the host sends is held for the delay and
then put on the wire, what it receives goes in at once. Linux, root and /dev/net/tun are needed.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import selectors
import struct
import threading
import time

_TUNSETIFF, _TAP, _NO_INFO = 0x400454CA, 0x2, 0x1000
# Large frames, or Python would be the slowest link: 1 Gb/s are 2,000 of these a second.
MTU = 60_000


def tap(name: str) -> int:
    """A new TAP device's file descriptor; the device goes when it is closed. OSError if refused."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_INFO))
    except OSError:
        os.close(file)
        raise
    return file


class DelayedCables:
    """Pairs of TAP devices joined by a thread; close() removes them.

    cables: for each host, names of the device that goes into its namespace and of the other one.
    seconds: that a frame from the first to the second waits.
    """

    def __init__(self, cables: list[tuple[str, str]], seconds: float) -> None:
        self.seconds = seconds
        self._files: list[int] = []
        self._ends: dict[int, tuple[int, float]] = {}  # from: (to, delay)
        try:
            for inner, outer in cables:
                for name in (inner, outer):
                    self._files.append(tap(name))
                self._ends[self._files[-2]] = (self._files[-1], seconds)
                self._ends[self._files[-1]] = (self._files[-2], 0.0)
        except OSError:
            self._close_files()
            raise
        self._stopped = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the devices."""
        self._stopped = True
        self._thread.join()
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        with selectors.DefaultSelector() as selector:
            for file in self._ends:
                selector.register(file, selectors.EVENT_READ)
            while not self._stopped:
                until = waiting[0][0] - time.monotonic() if waiting else 0.1
                for key, _ in selector.select(max(until, 0)):
                    to, delay = self._ends[key.fd]
                    for frame in _frames(key.fd):
                        due = time.monotonic() + delay
                        heapq.heappush(waiting, (due, next(order), to, frame))
                while waiting and waiting[0][0] <= time.monotonic():
                    _, _, to, frame = heapq.heappop(waiting)
                    try:
                        os.write(to, frame)
                    except OSError:
                        pass  # a device that is down, or full: a lost frame, as on a real wire


def _frames(file: int, most: int = 64):
    for _ in range(most):
        try:
            yield os.read(file, MTU + 18)
        except OSError:  # no more, or the device is down
            return
