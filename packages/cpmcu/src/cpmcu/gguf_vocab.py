"""A tokenizer as the metadata of a GGUF file: what llama.cpp needs to read and write text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cpmcu import tokenizer, tokenizer_gguf
from cpmcu.gguf_file import GGUFFile
from cpmcu.loader import Source
from cpmcu.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
Entry = tuple[str, Any, str]  # key, value, name of a GGUFValueType ("ARRAY:type" of an array)
# What llama.cpp's pre-tokenisers do differently from each other.
_PROBE = (
    "Hello, world! It's 12345 o'clock; we'LL see.\n\n  \tTabs  and   spaces \r\n über 3.14 ½ "
    "日本語 中文 🙂 _under_score--dash /path/to x=y+1; 7th A1B2 don't ''' \n \n end  "
)
_ARRAYS = {"tokens": "STRING", "merges": "STRING", "token_type": "INT32", "scores": "FLOAT32"}


def entries(source: Source) -> Iterator[Entry]:
    """The tokenizer of `source`; that of a GGUF file is passed on as it is.

    Yields nothing but `tokenizer.ggml.model` = "none" where the model brings no tokenizer.

    Raises:
        ValueError: llama.cpp has no pre-tokeniser that splits text as this tokenizer does.
    """
    if source.gguf is not None:
        yield from _passed_on(source.gguf)
        return
    words = tokenizer.load(source)
    if words is None:
        yield "tokenizer.ggml.model", "none", "STRING"
        return
    description = json.loads(words.backend.to_str())
    if description["model"].get("type") != "BPE":
        raise ValueError(f"{source.path}: only BPE tokenizers can be written to GGUF")
    tokens, kinds = _tokens(words, source.spec.vocab)
    merges = [m if isinstance(m, list) else m.split(" ") for m in description["model"]["merges"]]
    if not merges:
        raise ValueError(f"{source.path}: a tokenizer without merges cannot be written to GGUF")
    if description["model"].get("byte_fallback"):
        yield from _sentencepiece(description, tokens, kinds, merges)
    else:
        yield "tokenizer.ggml.model", "gpt2", "STRING"
        yield "tokenizer.ggml.pre", _pre_tokenizer(words, source), "STRING"
        yield "tokenizer.ggml.merges", [" ".join(m) for m in merges], "ARRAY:STRING"
    yield "tokenizer.ggml.tokens", tokens, "ARRAY:STRING"
    yield "tokenizer.ggml.token_type", kinds, "ARRAY:INT32"
    yield from _special(words, source)


def _passed_on(file: GGUFFile) -> Iterator[Entry]:
    for key, value in file.metadata.items():
        if not key.startswith("tokenizer."):
            continue
        name = key.rpartition(".")[2]
        if isinstance(value, list):
            if value and name in _ARRAYS:
                yield key, value, f"ARRAY:{_ARRAYS[name]}"
        elif isinstance(value, bool):
            yield key, value, "BOOL"
        elif isinstance(value, str):
            yield key, value, "STRING"
        elif isinstance(value, int):
            yield key, value, "UINT32"


def _tokens(words: Tokenizer, vocab: int) -> tuple[list[str], list[int]]:
    """Token texts and their kinds, as many as the embedding has rows."""
    backend = words.backend
    added = {i: t for i, t in backend.get_added_tokens_decoder().items() if i < vocab}
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    kinds = [_UNUSED] * vocab
    for text, i in backend.get_vocab(with_added_tokens=True).items():
        if i < vocab:
            tokens[i], kinds[i] = text, _NORMAL
    for i, token in added.items():
        tokens[i], kinds[i] = token.content, _CONTROL if token.special else _USER_DEFINED
    return tokens, kinds


def _pre_tokenizer(words: Tokenizer, source: Source) -> str:
    """llama.cpp's name of the rule that splits text into words, found by what it does."""
    if words.backend.normalizer is not None:
        raise ValueError(f"{source.path}: llama.cpp normalises no text for byte-level BPE")
    wanted = words.backend.pre_tokenizer.pre_tokenize_str(_PROBE)
    for name in tokenizer_gguf.PRE_TOKENIZERS:
        if tokenizer_gguf.pre_tokenizer(name).pre_tokenize_str(_PROBE) == wanted:
            return name
    known = ", ".join(tokenizer_gguf.PRE_TOKENIZERS)
    raise ValueError(
        f"{source.path}: the tokenizer splits text in none of the ways known here ({known}): "
        "llama.cpp's own converter may know it"
    )


def _sentencepiece(
    description: dict[str, Any], tokens: list[str], kinds: list[int], merges: list[list[str]]
) -> Iterator[Entry]:
    """Merges as scores: llama.cpp joins the pair that makes the token of the highest score."""
    scores = [-1e9] * len(tokens)
    index = {token: i for i, token in enumerate(tokens)}
    for rank, (left, right) in enumerate(merges):
        i = index.get(left + right)
        if i is not None and scores[i] == -1e9:
            scores[i] = -float(rank)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = _BYTE
    unknown = description["model"].get("unk_token")
    if unknown in index:
        kinds[index[unknown]] = _UNKNOWN
        yield "tokenizer.ggml.unknown_token_id", index[unknown], "UINT32"
    normalizer = json.dumps(description.get("normalizer") or {})
    yield "tokenizer.ggml.model", "llama", "STRING"
    yield "tokenizer.ggml.pre", "default", "STRING"
    yield "tokenizer.ggml.scores", scores, "ARRAY:FLOAT32"
    yield "tokenizer.ggml.add_space_prefix", "Prepend" in normalizer, "BOOL"


def _special(words: Tokenizer, source: Source) -> Iterator[Entry]:
    spec = source.spec
    ends = list(dict.fromkeys([*(i for i in words.eos if i < spec.vocab), *spec.eos]))
    for name, ids in (("bos", [] if spec.bos is None else [spec.bos]), ("eos", ends[:1]),
                      ("eot", ends[1:2])):  # fmt: skip
        if ids:
            yield f"tokenizer.ggml.{name}_token_id", ids[0], "UINT32"
    begins = spec.bos is not None and words.encode("a")[:1] == [spec.bos]
    yield "tokenizer.ggml.add_bos_token", begins, "BOOL"
    if words.template is not None:
        yield "tokenizer.chat_template", words.template.text, "STRING"
