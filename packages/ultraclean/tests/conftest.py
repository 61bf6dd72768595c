from __future__ import annotations

import pydoc_data.topics
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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


def _tokenizer(path: Path, texts: list[str], splits: list) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([t.lower() for t in texts], trainer)
    tokenizer.save(str(path))
    return path


def _isolated(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.fixture(scope="session")
def tokenizer_file(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer that cuts text the way DeepSeek-V2's does."""
    splits = [
        _isolated("[\r\n]"),
        _isolated(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺͰ-ͳΑ-ΡΣ-ϵҊ-ԯ]+"),
        _isolated(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        _isolated(r"\s+$"),
        _isolated(r"[一-龥ࠀ-一가-퟿]+"),
        pre_tokenizers.Digits(individual_digits=True),
    ]
    folder = tmp_path_factory.mktemp("tokenizer")
    chinese = ["自然语言处理是计算机科学的一个方向。" * 3, "我们在语料上训练模型，然后测量。"]
    return _tokenizer(folder / "tokenizer.json", [*prose, *chinese * 20], splits)


@pytest.fixture(scope="session")
def other_tokenizer_file(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose pre-tokenizer the native code does not know."""
    splits = [_isolated(r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")]
    return _tokenizer(tmp_path_factory.mktemp("other") / "tokenizer.json", prose, splits)


@pytest.fixture(scope="session")
def ultrafine(
    prose: list[str],
    shuffled: list[str],
    tokenizer_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Classifier:
    """A classifier with the paper's whole normaliser."""
    config = replace(SMALL, normaliser="ultrafine", tokenizer=str(tokenizer_file))
    return train(prose[::2], shuffled[::2], config, tmp_path_factory.mktemp("bpe") / "c")
