"""Strategies and compressors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apb import anchored, exact
from apb.compressors import Compressor, KeyDifference, KeyNorm, QueryAttention, Random
from apb.plan import Strategy

EXACT: dict[str, Callable[[], Strategy]] = {
    "dense": exact.Dense,
    "ring": exact.ring,
    "zigzag": exact.balanced_ring,
    "ulysses": exact.Ulysses,
}
APPROXIMATE = ("star", "apb", "spava")
STRATEGIES = (*EXACT, *APPROXIMATE)
COMPRESSORS = ("query-attention", "key-norm", "key-difference", "random", "none")


def make_compressor(name: str, *, seed: int = 0) -> Compressor | None:
    """A compressor by name; "none" is None. ValueError for another name."""
    if name == "none":
        return None
    made: dict[str, Callable[[], Compressor]] = {
        "query-attention": QueryAttention,
        "key-norm": KeyNorm,
        "key-difference": KeyDifference,
        "random": lambda: Random(seed),
    }
    if name not in made:
        raise ValueError(
            f"compressor must be one of {', '.join(COMPRESSORS)}, or an object such as "
            f"LocretHeads; got {name!r}"
        )
    return made[name]()


def make_strategy(
    name: str,
    compressor: str | Compressor | None = None,
    *,
    with_query: bool = False,
    **options: Any,
) -> Strategy:
    """A strategy by name.

    compressor: for apb and spava; None is query-attention with a query, key-norm without.
    options: anchor_length, passing_length, pool_kernel, sink. Raises ValueError for a strategy that
    is not there, or an option that it does not have.
    """
    if name in EXACT or name == "star":
        allowed = {"anchor_length", "sink"} if name == "star" else set()
        surplus = [key for key in options if options[key] is not None and key not in allowed]
        if compressor not in (None, "none"):
            surplus.append("compressor")
        if surplus:
            raise ValueError(f"{name} has no {', '.join(surplus)}: leave it out")
        given = {key: value for key, value in options.items() if value is not None}
        return EXACT[name]() if name in EXACT else anchored.star(**given)
    if name not in APPROXIMATE:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}")
    if compressor is None:
        compressor = "query-attention" if with_query else "key-norm"
    if isinstance(compressor, str):
        compressor = make_compressor(compressor)
    given = {key: value for key, value in options.items() if value is not None}
    unknown = given.keys() - {"anchor_length", "passing_length", "pool_kernel", "sink"}
    if unknown:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}: leave it out")
    return (anchored.apb if name == "apb" else anchored.spava)(compressor, **given)  # type: ignore[arg-type]
