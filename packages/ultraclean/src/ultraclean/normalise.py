"""Making text into the words a classifier was trained on.

A fastText model knows only the words its training text was cut into: scoring text that was
normalised another way gives numbers that mean nothing. So the name is stored with each model.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from ultraclean.bpe import Tables
    from ultraclean.folding import Fold
    from ultraclean.native_args import BpeArgs
    from ultraclean.scorer import Scorer

# Control characters that fastText would take for the end of a word or of the line.
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_MANY_NEWLINES = re.compile(r"\n{3,}")
_SPACES = re.compile(r" +")
# Unified ideographs with their extensions, and the compatibility ones.
CJK = re.compile(r"([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
# Normalised when a model is trained and again when it is loaded: a Python with other Unicode
# tables, or another version of this file, then gives itself away.
_PROBE = "A\r\n\n\n\n\tÉcole  ﬁ Ⅷ 你好\u00a0\u0301か\u3099 Ǆ \x85\u2028x \U0001f642\U00020000 </s>"


def _fold(text: str) -> str:
    """Steps 1–3 of Ultra-FineWeb: at most two newlines, lower case, no combining marks."""
    text = unicodedata.normalize("NFKD", _MANY_NEWLINES.sub("\n\n", text).lower())
    if text.isascii():  # most English text: nothing to strip
        return text
    return "".join(c for c in text if unicodedata.category(c) != "Mn")


def spell_out(text: str) -> str:
    """Step 5: control characters as two."""
    for character, spelled in _ESCAPES.items():
        text = text.replace(character, spelled)
    return text


def escape(text: str) -> str:
    """Steps 5–6: control characters spelled out, one space between words."""
    return _SPACES.sub(" ", spell_out(text)).strip()


def _words(text: str) -> str:
    """Ultra-FineWeb's steps without its BPE: newlines become words of their own."""
    return escape(_fold(text).replace("\n", " \n ").replace("\t", " "))


def _whitespace(text: str) -> str:
    return " ".join(text.split())


def _dclm(text: str) -> str:
    """DCLM joins lines by a space and changes nothing else."""
    return " ".join(text.splitlines()).strip()


def _zh_char(text: str) -> str:
    return " ".join(CJK.sub(r" \1 ", _fold(text)).split())


_PLAIN: dict[str, Callable[[str], str]] = {
    "ultrafine-words": _words,
    "whitespace": _whitespace,
    "dclm": _dclm,
    "zh-char": _zh_char,
}
NORMALISERS = ("ultrafine", *_PLAIN)
"""Names that `Normaliser` knows."""


class Normaliser:
    """A named way to make text into words separated by spaces.

    - `ultrafine`: Ultra-FineWeb's own (arXiv 2505.05427, `infer_folder.py`): at most two newlines,
      lower case, NFKD without combining marks, BPE pieces each decoded alone and joined
      by a space, control characters spelled out. Needs `tokenizer`, a `tokenizer.json`; the
      released models use DeepSeek-V2's.
    - `ultrafine-words`: the same without the BPE; needs no file. The default here.
    - `whitespace`: words as they stand. `dclm`: lines joined by a space.
    - `zh-char`: folded, and each Chinese character a word.

    `ultrafine-words` is the default because it is what of the paper's recipe can be had without a
    download: case, accents and layout are folded the same way. What it lacks is the cutting:
    `end.` stays one word, and so does a line of Chinese (for which there is `zh-char`). Models of
    the two are not interchangeable.

    `ultrafine` and `ultrafine-words` strip combining marks, which damages Indic scripts and
    Japanese: they are made for English and Chinese.

    Raises:
        ValueError: unknown name, or a tokenizer missing or not wanted.
        FileNotFoundError: the tokenizer's file does not exist.
    """

    def __init__(self, name: str, tokenizer: str | Path | None = None) -> None:
        self.name = name
        self.tokenizer_hash: str | None = None
        self.tokenizer: Tokenizer | None = None
        self.tables: Tables | None = None
        if name == "ultrafine":
            if tokenizer is None:
                raise ValueError(
                    "normaliser 'ultrafine' needs tokenizer=PATH of a tokenizer.json; without one "
                    "use 'ultrafine-words'"
                )
            self._apply = self._bpe(Path(tokenizer))
        elif name in _PLAIN:
            if tokenizer is not None:
                raise ValueError(f"normaliser {name!r} takes no tokenizer: leave it out")
            self._apply = _PLAIN[name]
        else:
            known = ", ".join(NORMALISERS)
            raise ValueError(f"unknown normaliser {name!r}: expected one of {known}")

    def _bpe(self, path: Path) -> Callable[[str], str]:
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {path} does not exist: give a tokenizer.json")
        from tokenizers import Tokenizer

        data = path.read_bytes()
        self.tokenizer_hash = hashlib.sha256(data).hexdigest()
        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        from ultraclean.bpe import tables_of

        self.tokenizer = tokenizer
        self.tables, self.left_to_library = tables_of(data)

        class Pieces(dict[int, str]):
            """Each id decoded alone, so its text does not depend on the context: once is enough."""

            def __missing__(self, i: int) -> str:
                piece = self[i] = tokenizer.decode([i], skip_special_tokens=False)
                return piece

        pieces = Pieces()

        def apply(text: str) -> str:
            ids = tokenizer.encode(_fold(text), add_special_tokens=False).ids
            return escape(" ".join([pieces[i] for i in ids]))

        return apply

    @property
    def fold(self) -> Fold:
        """What each code point becomes, for the native code."""
        from ultraclean.folding import fold_of

        return fold_of(self.name)

    def features(self, scorer: Scorer) -> BpeArgs:
        """What each token of the tokenizer adds to a classifier's score, for the native code."""
        from ultraclean import bpe, native, native_args

        tokens, several = bpe.features_of_tokens(self.tokenizer, scorer.words, scorer.table)
        if self.tables is not None:
            return self.tables.args(tokens, several)
        args = native_args.BpeArgs(tokens=tokens.ctypes.data, several=several.ctypes.data)
        return native.keep(args, tokens, several)

    def ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(token ids uint32 of all texts, offsets int64 `[texts + 1]`) from `tokenizers`."""
        import numpy as np

        folded = [_fold(t.encode("utf-8", "replace").decode("utf-8")) for t in texts]
        encoded = self.tokenizer.encode_batch_fast(folded, add_special_tokens=False)
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(e.ids) for e in encoded], out=offsets[1:])
        return np.array([i for e in encoded for i in e.ids] + [0], np.uint32), offsets

    def count(self, text: str, made: str) -> int:
        """Tokens of a text, or words where there is no tokenizer; `made` is the normalised text."""
        if self.tokenizer is None:
            return len(made.split())
        return int(self.ids([text])[1][-1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it makes of a probing text: equal where two normalisers are one."""
        return hashlib.sha256(self(_PROBE).encode()).hexdigest()

    def __call__(self, text: str) -> str:
        """The words of `text` on one line, separated by spaces.

        Lone surrogates, which UTF-8 cannot hold, become "?".
        """
        return self._apply(text.encode("utf-8", "replace").decode("utf-8"))
