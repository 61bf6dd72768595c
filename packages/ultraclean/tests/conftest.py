from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest

from ultraclean import Classifier, ClassifierConfig, train


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Real paragraphs that every Python carries."""
    texts = pydoc_data.topics.topics.values()
    return [p for text in texts for p in text.split("\n\n") if len(p) > 200]


@pytest.fixture(scope="session")
def shuffled(prose: list[str]) -> list[str]:
    """The same words in alphabetical order: bad text with the good text's vocabulary."""
    return [" ".join(sorted(p.split())) for p in prose]


SMALL = ClassifierConfig(dim=8, bucket=20_000, min_count=3, lr=0.5)


@pytest.fixture(scope="session")
def classifier(
    prose: list[str], shuffled: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Classifier:
    folder: Path = tmp_path_factory.mktemp("trained") / "classifier"
    return train(prose[::2], shuffled[::2], SMALL, folder)
