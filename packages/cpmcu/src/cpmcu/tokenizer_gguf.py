"""Build a tokenizer from a GGUF file's metadata: byte-level BPE, or SentencePiece BPE by scores."""

from __future__ import annotations

from functools import partial
from itertools import repeat
from typing import Any

from cpmcu._fields import Fields
from cpmcu.gguf_file import GGUFFile
from cpmcu.template import ChatTemplate
from cpmcu.tokenizer import Tokenizer

# llama.cpp knows pre-tokenisers by name, not by content. Only those whose rule is certain.
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": _WORD + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORD + r"\p{N}" + _REST,
}
_GPT2 = ("default", "gpt-2")
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact")
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6


def from_gguf(file: GGUFFile) -> Tokenizer:
    """The tokenizer in the metadata of `file`; ValueError where it is of another kind."""
    fields = Fields(file.metadata, str(file.path))
    kind = fields.text("tokenizer.ggml.model")
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise fields.error("tokenizer.ggml.tokens", "has duplicates")
    kinds = fields.values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise fields.error("tokenizer.ggml.token_type", f"must have {len(tokens)} entries")
    if kind == "gpt2":
        backend = _byte_level(fields, tokens)
    elif kind == "llama":
        backend = _sentencepiece(fields, tokens)
    else:
        raise fields.error("tokenizer.ggml.model", f"is '{kind}', supported are gpt2 and llama")
    from tokenizers import AddedToken

    for token, token_kind in zip(tokens, kinds, strict=True):
        if token_kind in (_CONTROL, _USER_DEFINED) and token:
            added = AddedToken(token, special=token_kind == _CONTROL, normalized=False)
            (backend.add_special_tokens if token_kind == _CONTROL else backend.add_tokens)([added])
    ids = {
        name: fields.integer(f"tokenizer.ggml.{name}_token_id", None, low=0, high=len(tokens) - 1)
        for name in ("bos", "eos")
    }
    add_bos = fields.boolean("tokenizer.ggml.add_bos_token", kind == "llama")
    template = fields.text("tokenizer.chat_template", "")
    constants = {f"{n}_token": "" if i is None else tokens[i] for n, i in ids.items()}
    return Tokenizer(
        backend,
        template=partial(ChatTemplate, template, str(file.path), constants) if template else None,
        eos=() if ids["eos"] is None else (ids["eos"],),
        prefix=(ids["bos"],) if add_bos and ids["bos"] is not None else (),
    )


def _strings(fields: Fields, name: str) -> list[str]:
    value = fields.values.get(name)
    if not isinstance(value, list) or set(map(type, value)) != {str}:
        raise fields.error(name, "must be a list of strings")
    return value


PRE_TOKENIZERS = (*_DIGITS_THEN_GPT2, "gpt-2", "default", *_SPLITS)


def pre_tokenizer(name: str) -> Any:
    """The rule behind one of llama.cpp's names in `PRE_TOKENIZERS`."""
    from tokenizers import Regex, pre_tokenizers

    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")
        words = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif name in _DIGITS_THEN_GPT2:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        words = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(words)


def _byte_level(fields: Fields, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models

    pre = fields.text("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise fields.error("tokenizer.ggml.pre", f"is '{pre}', supported are {known}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    listed = _strings(fields, "tokenizer.ggml.merges")
    try:
        parts = " ".join(listed).split(" ")
        if set(map(str.count, listed, repeat(" "))) != {1}:
            parts = [part for merge in listed for part in merge.split(" ", 1)]
        merges = list(zip(parts[::2], parts[1::2], strict=True))
        # Llama 3 looks whole words up first: some of its tokens are unreachable by merges.
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # tokenizers raises bare Exception; which merge it is, is looked up
        for merge in listed:
            left, _, right = merge.partition(" ")
            if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
                message = f"has '{merge}', which the tokens lack"
                raise fields.error("tokenizer.ggml.merges", message) from None
        raise fields.error("tokenizer.ggml.merges", f"is not valid ({error})") from None
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = fields.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise fields.error("tokenizer.ggml.scores", f"must have {len(tokens)} entries")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # SentencePiece joins the pair that makes the best-scored token: every split of a token into
    # two tokens is a merge, in the order of the results' scores.
    merges = [
        (-score, vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = fields.integer("tokenizer.ggml.unknown_token_id", 0, low=0, high=len(tokens) - 1)
    model = models.BPE(
        vocab=vocabulary, merges=pairs, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if fields.boolean("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend
