"""Work in parallel, results in order, a bounded place of pieces in memory."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Place = TypeVar("Place")
Item = TypeVar("Item")
First = TypeVar("First")
Choice = TypeVar("Choice")
Second = TypeVar("Second")


_END: Any = object()


def ahead(items: Iterable[Item], workers: int) -> Iterator[Item]:
    """The items, made by a thread of their own that is at most `workers` of them ahead.

    For files: a compressed one is unpacked while what was read before is worked on. With one
    worker, made in this thread.
    """
    if workers == 1:
        yield from items
        return
    made: queue.Queue[tuple[Item, BaseException | None]] = queue.Queue(workers)
    stopped = threading.Event()

    def put(item: Item, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            try:
                made.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_END)
        except BaseException as error:  # for the one who waits for the items
            put(_END, error)

    maker = threading.Thread(target=make, name="ultraclean-reader", daemon=True)
    maker.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        maker.join()


def in_order(items: Iterable[Item], work: Callable[[Item], First], workers: int) -> Iterator[First]:
    """work(item) of each item, in order; with one worker, in this thread."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[First]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_order_twice(
    items: Iterable[tuple[Place, Item]],
    first: Callable[[Item], First],
    choose: Callable[[First], Choice],
    second: Callable[[First, Choice], Second],
    workers: int,
) -> Iterator[tuple[Place, First, Choice, Second]]:
    """(place, first(item), choice, second(first, choice)) of each, in order.

    `first` and `second` run in parallel, `choose` in order in this thread in between: what depends
    on all that came before.
    """
    if workers == 1:
        for place, item in items:
            made = first(item)
            choice = choose(made)
            yield place, made, choice, second(made, choice)
        return
    begun: deque[tuple[Place, Future[First]]] = deque()
    chosen: deque[tuple[Place, First, Choice, Future[Second]]] = deque()
    most = 2 * workers
    with ThreadPoolExecutor(workers) as pool:

        def advance() -> None:
            place, future = begun.popleft()
            made = future.result()
            choice = choose(made)
            chosen.append((place, made, choice, pool.submit(second, made, choice)))

        try:
            for place, item in items:
                begun.append((place, pool.submit(first, item)))
                if len(begun) > most:
                    advance()
                while chosen and (len(chosen) > most or chosen[0][3].done()):
                    place, made, choice, future = chosen.popleft()
                    yield place, made, choice, future.result()
            while begun:
                advance()
            while chosen:
                place, made, choice, future = chosen.popleft()
                yield place, made, choice, future.result()
        finally:
            for _, future in begun:
                future.cancel()
            for *_, last in chosen:
                last.cancel()
