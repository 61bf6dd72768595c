"""How a run looks in a terminal, and in a log file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """One line per stage: a live bar in a terminal, occasional plain lines elsewhere.

    Call it with (step name, text, share done or None); use it as a context manager.
    """

    def __init__(self, console: Console | None = None, quiet_seconds: float = 15.0) -> None:
        self.console = console or Console(stderr=True)
        self.quiet_seconds = quiet_seconds
        self._last: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.fields[step]:<10}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )

    def __enter__(self) -> Display:
        """Start drawing, where there is a terminal to draw in."""
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing; what has been drawn stays."""
        if self.console.is_terminal:
            self._progress.stop()

    def __call__(self, step: str, text: str, done: float | None) -> None:
        """Show `text` as what `step` is doing."""
        if not self.console.is_terminal:
            self._log(step, text, done)
            return
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task("", total=1.0, step=step)
        task = self._tasks[step]
        self._progress.update(task, description=escape(text), completed=done)
        if done is not None and done >= 1:
            self._progress.stop_task(task)

    def _log(self, step: str, text: str, done: float | None) -> None:
        # A log wants the beginning and the end of each stage, and a sign of life in between.
        now = time.monotonic()
        ended = done is not None and done >= 1
        if step in self._last and not ended and now - self._last[step] < self.quiet_seconds:
            return
        self._last[step] = now
        share = f"{done:4.0%} " if done is not None and not ended else "     "
        self.console.print(f"{step:<10} {share}{text}", markup=False, highlight=False)
