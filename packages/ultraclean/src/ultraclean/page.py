"""One HTML file that shows what a filter kept and rejected: scores, sources, examples of each."""

from __future__ import annotations

import html
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultraclean._files import write_text
from ultraclean.jsonl import lines

_BANDS = 10
_SHOWN = 1200  # characters of a text
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#222}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.15rem .8rem .15rem 0;text-align:right}td:first-child,th:first-child{text-align:left}
details{border-top:1px solid #ddd;padding:.4rem 0}summary{cursor:pointer}pre{white-space:pre-wrap;
background:#f6f6f6;padding:.6rem;font-size:13px}.kept{fill:#2a7f62}.rejected{fill:#c8553d}
.k{color:#2a7f62}.r{color:#c8553d}"""


def write_page(
    folder: Path, path: Path, samples: int = 3, text_key: str = "text", source_key: str = "source"
) -> int:
    """Write the page of a filter's output folder; returns how many texts it shows.

    Args:
        folder: what `filter_corpus` wrote.
        path: the HTML file.
        samples: texts of each source and tenth of the score, drawn evenly, always the same.
        text_key, source_key: columns.

    Raises:
        ValueError: the folder is no finished output.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        threshold, suffix = report["job"]["threshold"], report["job"]["suffix"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no finished output of a filter ({error})") from None
    draw = random.Random(0)
    counts = {"kept": [0] * (2 * _BANDS), "rejected": [0] * (2 * _BANDS)}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    seen: dict[tuple[str, int], int] = {}
    for stream, histogram in counts.items():
        for row in _rows(folder / f"{stream}{suffix}"):
            score = row["ultraclean_score"]
            histogram[min(int(score * 2 * _BANDS), 2 * _BANDS - 1)] += 1
            source = row.get(source_key)
            key = ("" if source is None else str(source), min(int(score * _BANDS), _BANDS - 1))
            seen[key] = seen.get(key, 0) + 1
            example = {
                "score": score, "stream": stream, "text": str(row[text_key])[:_SHOWN],
                "reason": row.get("ultraclean_reason") or "",
            }  # fmt: skip
            shown = found.setdefault(key, [])
            if len(shown) < samples:
                shown.append(example)
            elif (at := draw.randrange(seen[key])) < samples:  # reservoir: each row alike
                shown[at] = example
    write_text(path, _page(report, threshold, counts, found))
    return sum(map(len, found.values()))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
        return
    for _, line in lines(path):
        if line.strip():
            yield json.loads(line)


def _page(
    report: dict[str, Any],
    threshold: float,
    counts: dict[str, list[int]],
    found: dict[tuple[str, int], list[dict[str, Any]]],
) -> str:
    parts = [
        "<!doctype html><meta charset=utf-8><title>ultraclean</title>",
        f"<style>{_STYLE}</style><h1>What the filter kept</h1>",
        f"<p>{report['total']:,} rows: <b class=k>{report['kept']:,} kept</b>, "
        f"<b class=r>{report['rejected']:,} rejected</b>, {report['malformed']:,} malformed; "
        f"threshold {threshold:g}.</p>",
        _histogram(counts, threshold),
        "<h2>Sources</h2><table><tr><th>source<th>kept<th>rejected<th>share kept",
    ]
    for source, row in report["by_source"].items():
        total = row["kept"] + row["rejected"]
        parts.append(f"<tr><td>{html.escape(source or '(none)')}<td>{row['kept']:,}"
                     f"<td>{row['rejected']:,}<td>{row['kept'] / total:.1%}")  # fmt: skip
    parts.append("</table><h2>Why rows were set aside</h2><table>")
    for reason, count in {**report["reasons"], **report["malformed_reasons"]}.items():
        parts.append(f"<tr><td>{html.escape(reason)}<td>{count:,}")
    parts.append("</table>")
    for source in sorted({source for source, _ in found}):
        parts.append(f"<h2>{html.escape(source or '(no source)')}</h2>")
        for band in reversed(range(_BANDS)):
            for e in sorted(found.get((source, band), []), key=lambda e: -e["score"]):
                mark = e["stream"][0]
                why = f" · {html.escape(e['reason'])}" if e["reason"] else ""
                head = html.escape(" ".join(e["text"][:90].split()))
                parts.append(
                    f"<details><summary><b class={mark}>{e['score']:.3f}</b>{why} {head}</summary>"
                    f"<pre>{html.escape(e['text'])}</pre></details>"
                )
    return "\n".join(parts) + "\n"


def _histogram(counts: dict[str, list[int]], threshold: float) -> str:
    """Rows by score, kept above rejected, as SVG."""
    width, height, bars = 600, 160, 2 * _BANDS
    most = max(1, *(a + b for a, b in zip(*counts.values(), strict=True)))
    step = width / bars
    parts = [f'<svg viewBox="0 0 {width} {height + 20}" width="{width}" role="img" '
             'aria-label="rows by score">']  # fmt: skip
    for i in range(bars):
        top = float(height)
        for stream in ("rejected", "kept"):
            size = counts[stream][i] / most * height
            top -= size
            parts.append(f'<rect class="{stream}" x="{i * step + 1:.1f}" y="{top:.1f}" '
                         f'width="{step - 2:.1f}" height="{size:.1f}"/>')  # fmt: skip
    x, foot = threshold * width, height + 15
    parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#222" '
                 f'stroke-dasharray="4"/><text x="0" y="{foot}">0</text>'
                 f'<text x="{width}" y="{foot}" text-anchor="end">1</text></svg>')  # fmt: skip
    return "".join(parts)
