"""Read typed fields out of untrusted metadata, and say which file and field is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MISSING = object()


class Fields:
    """A mapping of metadata with checked access. Every complaint names `source` and the field."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, complaint: str) -> ValueError:
        """The ValueError "source: field 'name' complaint"."""
        return ValueError(f"{self.source}: field '{name}' {complaint}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:  # JSON null means "not given"
            return value
        if default is _MISSING:
            raise self.error(name, "is missing")
        return default

    def integer(
        self, name: str, default: Any = _MISSING, *, low: int = 1, high: int = 2**31
    ) -> int:
        """An integer in [low, high]; `default` (any value, also None) where the field is absent."""
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, got {_show(value)}")
        if not low <= value <= high:
            raise self.error(name, f"must be in [{low}, {high}], got {value}")
        return value

    def number(self, name: str, default: Any = _MISSING, *, above: float = 0.0) -> float:
        """A finite number > `above`."""
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, got {_show(value)}")
        if not (abs(value) < 1e30 and math.isfinite(value) and value > above):
            raise self.error(name, f"must be a finite number above {above}, got {value}")
        return float(value)

    def boolean(self, name: str, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {_show(value)}")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A string."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, str):
            raise self.error(name, f"must be a string, got {_show(value)}")
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of `length` positive finite numbers."""
        value = self._get(name, _MISSING)
        good = isinstance(value, list) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 1e30 for v in value
        )
        if not good or len(value) != length:
            raise self.error(name, f"must be a list of {length} positive numbers")
        return tuple(float(v) for v in value)

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: an integer, a list of them, or absent."""
        value = self._get(name, [])
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in listed):
            raise self.error(name, f"must be a token id or a list of them, got {_show(value)}")
        return tuple(listed)

    def child(self, name: str) -> Fields | None:
        """A nested mapping, or None where it is absent."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be a mapping, got {_show(value)}")
        return Fields(value, f"{self.source}: {name}")


def read_json(path: Path) -> Fields:
    """The JSON object in `path`; ValueError where it is no valid UTF-8 JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return Fields(value, str(path))


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
