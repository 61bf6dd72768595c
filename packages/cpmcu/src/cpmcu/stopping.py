"""Stop strings in a stream: found across token borders, never shown, nothing shown too early."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Passes text through until one of `stops` appears in it.

    Text that might be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise ValueError(f"stop must be non-empty strings, got {self._stops!r}")
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Text that is safe to show now; nothing more once a stop string was found."""
        if self.stopped:
            return ""
        text = self._held + piece
        # The earliest start wins: that is where a reader of the whole text would cut.
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
