"""Parquet through the filter: columns stay as they are, a score and a reason join them.

A Parquet file cannot be cut back to an earlier state, as going on after a kill asks. So outputs
grow as Arrow streams, which can, and become Parquet when all is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultraclean.jsonl import COLUMNS
from ultraclean.jsonl_format import SHOWN_CHARS, Rows, utf8

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK_ROWS = 1024
_GROUP_ROWS = 1 << 16


class Parquet:
    """Rows in, rows out, of the schema that the inputs share.

    Args:
        text_key, source_key: columns.
        max_bytes: a longer text is malformed.

    Raises:
        ImportError: pyarrow is missing.
    """

    suffix = ".parquet"

    def __init__(self, text_key: str, source_key: str, max_bytes: int) -> None:
        self.text_key, self.source_key, self.max_bytes = text_key, source_key, max_bytes
        self._schema: pa.Schema | None = None
        _arrow()

    def check(self, path: Path) -> None:
        """Raise what is wrong with an input that can be known at once."""
        pa = _arrow()
        import pyarrow.parquet as parquet

        if not path.is_file():
            raise FileNotFoundError(f"input {path} does not exist: expected a .parquet file")
        try:
            schema = parquet.read_schema(path).remove_metadata()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged or no Parquet ({error}): fetch it again") from None
        if self.text_key not in schema.names:
            raise ValueError(
                f"{path} has no column {self.text_key!r}, but {', '.join(schema.names)}: name the "
                "text's with --text-key"
            )
        if not pa.types.is_string(kind := schema.field(self.text_key).type) and not (
            pa.types.is_large_string(kind)
        ):
            raise ValueError(f"{path}: the column {self.text_key!r} is {kind}, not text")
        for name in COLUMNS:
            if name in schema.names:
                schema = schema.remove(schema.get_field_index(name))
        if self._schema is not None and schema != self._schema:
            raise ValueError(f"{path} has other columns than the inputs before it: filter it apart")
        self._schema = schema

    def blocks(self, path: Path) -> Iterator[tuple[int, Any]]:
        """(number of the first row, record batch), always the same."""
        import pyarrow.parquet as parquet

        first = 1
        with parquet.ParquetFile(path) as file:
            columns = self._schema.names
            for batch in file.iter_batches(_BLOCK_ROWS, columns=columns, use_threads=False):
                yield first, batch
                first += len(batch)

    def parse(self, block: tuple[int, Any]) -> Rows:
        """The rows of a block."""
        first, batch = block
        texts = batch.column(self.text_key).to_pylist()
        sources = [None] * len(texts)
        if self.source_key in batch.schema.names:
            sources = batch.column(self.source_key).to_pylist()
        problems = [self._problem(text) for text in texts]
        return Rows(
            list(range(first, first + len(texts))),
            [text if not why else "" for text, why in zip(texts, problems, strict=True)],
            problems,
            ["" if s is None else utf8(str(s)[:SHOWN_CHARS]) for s in sources],
            batch,
        )

    def _problem(self, text: str | None) -> str:
        if text is None:
            return f"{self.text_key!r} is null"
        if len(text) > self.max_bytes:
            return "too long"
        return "" if text.strip() else "empty"

    def _full_schema(self) -> pa.Schema:
        pa = _arrow()
        added = (pa.field(COLUMNS[0], pa.float64()), pa.field(COLUMNS[1], pa.string()))
        return pa.schema([*self._schema, *added])

    def header(self) -> bytes:
        """What each output begins with: the schema."""
        return self._full_schema().serialize().to_pybytes()

    def render(
        self, path: Path, rows: Rows, scores: list[float | None], reasons: list[str]
    ) -> dict[str, bytes]:
        """What each output gets of a block: record batches."""
        pa = _arrow()
        why = [p or r or None for p, r in zip(rows.problems, reasons, strict=True)]
        arrays = [*rows.content.columns, pa.array(scores, pa.float64()), pa.array(why, pa.string())]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._full_schema())
        stream = ["malformed" if p else "rejected" if r else "kept"
                  for p, r in zip(rows.problems, reasons, strict=True)]  # fmt: skip
        out = {}
        for name in ("kept", "rejected", "malformed"):
            chosen = pa.array([i for i, s in enumerate(stream) if s == name], pa.int64())
            out[name] = batch.take(chosen).serialize().to_pybytes() if len(chosen) else b""
        return out

    def finish(self, partial: Path, final: Path) -> None:
        """Make Parquet of a whole output; made again if a kill comes in between."""
        pa = _arrow()
        import pyarrow.parquet as parquet

        from ultraclean._files import atomic_path

        with (
            pa.OSFile(str(partial)) as source,
            atomic_path(final) as target,
            parquet.ParquetWriter(target, self._full_schema(), compression="zstd") as writer,
        ):
            waiting: list[pa.RecordBatch] = []
            for batch in pa.ipc.open_stream(source):
                waiting.append(batch)
                if sum(map(len, waiting)) >= _GROUP_ROWS:
                    writer.write_table(pa.Table.from_batches(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting))
        partial.unlink()


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'minicpm4-ultraclean[parquet]'"
        ) from error
    return pyarrow
