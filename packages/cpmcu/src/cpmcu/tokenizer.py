"""Text to token ids and back, from a transformers folder or a GGUF file, without transformers."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmcu._fields import Fields, read_json
from cpmcu.template import ChatTemplate

if TYPE_CHECKING:
    from cpmcu.loader import Source

Message = Mapping[str, Any]
_MOST_IDS = 1 << 24
_DIGITS = bytes.maketrans(b"123456789", b"000000000")


class Tokenizer:
    """A byte-exact tokenizer around `tokenizers.Tokenizer`.

    Args:
        backend: a tokenizers.Tokenizer whose decoder is byte-level, or SentencePiece-like with
            byte fallback.
        template: makes what renders chat messages, when it is first asked for: Jinja is slow to
            import; None where the model brings none.
        eos: further ids that end a text, beside those of the model's spec.
        prefix: ids that `encode` puts first (llama.cpp's add_bos_token, which tokenizer.json
            expresses inside `backend`).
    """

    def __init__(
        self,
        backend: Any,
        *,
        template: Callable[[], ChatTemplate] | None = None,
        eos: Sequence[int] = (),
        prefix: Sequence[int] = (),
    ) -> None:
        self.backend, self._template = backend, template
        self.eos, self.prefix = tuple(eos), tuple(prefix)
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        # Of the others a text needs few: each is looked up when it is met.
        self._bytes = {i: token.content.encode() for i, token in added.items()}
        self._convert = _converter(backend)

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """What renders chat messages; None where the model brings none.

        Raises:
            ValueError: it is no valid Jinja.
        """
        return None if self._template is None else self._template()

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`. `special` adds what the model expects around a text (BOS).

        Special tokens written out in `text` become their ids, as in transformers.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text is not valid Unicode: {error.reason} at {error.start}"
            ) from None
        ids = self.backend.encode(text, add_special_tokens=special).ids
        return (
            [*self.prefix, *ids]
            if special and ids[: len(self.prefix)] != list(self.prefix)
            else ids
        )

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return "".join(map(stream.feed, ids)) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; empty for ids the vocabulary leaves out."""
        known = self._bytes.get(token)
        if known is None:
            text = self.backend.id_to_token(token) if 0 <= token < _MOST_IDS else None
            known = self._bytes[token] = b"" if text is None else self._convert(text)
        return known

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A decoder to feed one id at a time."""
        return TextStream(self, skip_special=skip_special)

    def chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Ids of a conversation that asks for the assistant's next answer."""
        if self.template is None:
            raise ValueError("the model has no chat template: give prompt= instead of messages=")
        # The template writes the special tokens itself, BOS included.
        return self.encode(self.template.render(messages, **variables), special=False)


class TextStream:
    """Turns ids into text piece by piece and never splits a character.

    The pieces, with `flush`, join to exactly what `Tokenizer.decode` returns for all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text that `token` completes; empty in the middle of a character."""
        if token in self._skip:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def load(source: Source) -> Tokenizer | None:
    """The tokenizer of a model; None where it brings none (token ids still work)."""
    if source.gguf is not None:
        from cpmcu.tokenizer_gguf import from_gguf

        kind = source.gguf.metadata.get("tokenizer.ggml.model", "none")
        return None if kind == "none" else from_gguf(source.gguf)
    return from_folder(source.path) if (source.path / "tokenizer.json").is_file() else None


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a transformers folder (tokenizer.json); FileNotFoundError without one."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; the model folder needs it to read and write text"
        )
    try:
        text = path.read_bytes()
        backend = Backend.from_buffer(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a valid tokenizer ({error})") from None
    _check_ids(path, text, backend)
    # Padding and truncation are settings of the training run that left them in the file.
    backend.no_padding()
    backend.no_truncation()
    settings_path = folder / "tokenizer_config.json"
    settings = (
        read_json(settings_path) if settings_path.is_file() else Fields({}, str(settings_path))
    )
    named = {name: _content(settings, name) for name in ("bos_token", "eos_token")}
    eos = backend.token_to_id(named["eos_token"]) if named["eos_token"] else None
    template_path = folder / "chat_template.jinja"
    if template_path.is_file():
        template = template_path.read_text(encoding="utf-8")
    else:
        template_path, template = settings_path, _template_text(settings)
    return Tokenizer(
        backend,
        template=partial(ChatTemplate, template, str(template_path), named) if template else None,
        eos=() if eos is None else (eos,),
    )


def _content(settings: Fields, name: str) -> str:
    # A token is written as a string, or as a mapping with its stripping rules.
    value = settings.values.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _template_text(settings: Fields) -> str | None:
    value = settings.values.get("chat_template")
    if isinstance(value, list):  # several named templates
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}.get(
            "default"
        )
    return value if isinstance(value, str) else None


def _check_ids(path: Path, text: bytes, backend: Any) -> None:
    """ValueError where an id is so high that nobody should go through all up to it."""
    if b"00000000" not in text.translate(_DIGITS):  # then no id is that high
        return
    added = backend.get_added_tokens_decoder()
    highest = max([*backend.get_vocab(with_added_tokens=False).values(), *added], default=-1)
    if highest >= _MOST_IDS:
        raise ValueError(f"{path}: token id {highest} is above {_MOST_IDS - 1}")


def _converter(backend: Any) -> Callable[[str], bytes]:
    """From a token's text to its bytes, by the kind of decoder the tokenizer has."""
    # Of the decoder alone: all of the tokenizer as JSON would cost more than loading the model.
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    kinds = {d.get("type"): d for d in (decoder, *decoder.get("decoders", ()))}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in byte_characters().items()}

        def convert(text: str) -> bytes:
            return (
                bytes(byte_of[c] for c in text)
                if all(c in byte_of for c in text)
                else text.encode()
            )
    elif "ByteFallback" in kinds:

        def convert(text: str) -> bytes:
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes([int(text[3:5], 16)])
            return text.replace("▁", " ").encode()
    else:
        raise ValueError(
            f"tokenizer.json: field 'decoder' is {decoder.get('type')!r}, supported are byte-level "
            "BPE and BPE with byte fallback"
        )
    return convert


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}
