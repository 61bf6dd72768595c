"""One sequence of an engine: its tokens and their cache, and what can be done with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpmcu import generation, saving
from cpmcu import threads as thread_count
from cpmcu._torch import torch
from cpmcu.cache import KVCache
from cpmcu.results import Generation, Score, Stream
from cpmcu.sampling import log_likelihood
from cpmcu.spec import ModelSpec
from cpmcu.tokenizer import Message, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from cpmcu.backends import Decoder


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to run, which sessions share.

    Attributes:
        spec: its hyper-parameters, `spec.sparse` the sparse attention in use.
        tokenizer: None: token ids only.
        dtype: name of that of arithmetic, keys and values.
        quant: of its weights.
        backend: name of the backend in use.
        decoder: that backend's.
        max_context: tokens that a session may hold.
        threads: for every call; None: `threads.default`'s.
        turn: held by the session that computes.
    """

    spec: ModelSpec
    tokenizer: Tokenizer | None
    dtype: str
    quant: str
    backend: str
    decoder: Decoder
    max_context: int
    threads: int | None
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False)


class Session:
    """A sequence: `tokens` are the ids now in its cache, `arithmetic` the name of `dtype`, other
    attributes as in `Loaded`.

    Make one with `Engine.session`; an engine is its own first. One session is not for concurrent
    calls from several threads, those of an engine take turns.
    """

    def __init__(self, model: Loaded) -> None:
        self._model, self.spec, self.tokenizer = model, model.spec, model.tokenizer
        self.arithmetic, self.quant, self.backend = model.dtype, model.quant, model.backend
        self.max_context, self.threads = model.max_context, model.threads
        self.tokens: list[int] = []
        self._decoder = model.decoder
        self._cache = KVCache(model.spec, model.dtype, model.max_context, model.decoder.device)

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's dtype of arithmetic, keys and values."""
        return getattr(torch, self.arithmetic)

    @property
    def place(self) -> str:
        """What computes: so many threads, or a GPU, and whether with CUDA graphs."""
        if self.backend == "gpu":
            return self._decoder.describe()
        return f"{self.threads or thread_count.default()} threads"

    def reset(self) -> None:
        """Forget the sequence."""
        self.rollback(0)

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens; ValueError outside 0..len(tokens)."""
        if not 0 <= length <= len(self.tokens):
            raise ValueError(f"length must be in 0..{len(self.tokens)} (tokens held), got {length}")
        del self.tokens[length:]
        self._cache.length = length

    def save(self, path: str | Path) -> None:
        """Write the sequence to `path` (safetensors): tokens, keys and values.

        Raises:
            ValueError: it is empty.
        """
        saving.save(path, self._model, self.tokens, self._cache)

    def restore(self, path: str | Path) -> None:
        """Go on with a sequence that `save` wrote, in place of the present one, which is gone
        also where the file is refused. Nothing is computed again.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is damaged, of another model, or longer than `max_context`.
        """
        self.reset()
        self.tokens = saving.restore(path, self._model, self._cache)

    def feed(self, token_ids: Sequence[int]) -> np.ndarray:
        """Append tokens to the sequence; the logits after the last, float32 [vocab]: `prefill` and
        `decode` without PyTorch, which the CPU backend does not need.

        Raises:
            ValueError: no tokens, an id outside the vocabulary, or more than the context holds.
        """
        for logits in self._iterate(self._checked(token_ids), every=False):
            last = logits
        return last

    def prefill(self, token_ids: Sequence[int]) -> Tensor:
        """Append tokens to the sequence; the logits after the last, fp32 [vocab].

        Raises:
            ValueError: no tokens, an id outside the vocabulary, or more than the context holds.
        """
        return torch.from_numpy(self.feed(token_ids))

    def decode(self, token_id: int) -> Tensor:
        """Append one token; the logits after it, fp32 [vocab]."""
        return torch.from_numpy(self.feed([token_id]))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of a new sequence, fp32 [len(token_ids), vocab]."""
        self.reset()
        ids = self._checked(token_ids)
        return torch.cat([torch.from_numpy(x) for x in self._iterate(ids, every=True)])

    def score(self, texts: Sequence[str]) -> list[Score]:
        """Log-likelihood of each text on its own.

        The context of the first token is BOS where the model has one; otherwise the first token
        is context only, and neither it nor its bytes are counted. An empty text scores (0, 0, 0).
        """
        words = self._words("score(texts)")
        scores = []
        for text in texts:
            ids = words.encode(text, special=False)
            ids = ids if self.spec.bos is None else [self.spec.bos, *ids]
            if len(ids) < 2:
                scores.append(Score(0.0, 0, 0))
                continue
            self.reset()
            total, at = 0.0, 1
            for chunk in self._iterate(self._checked(ids[:-1]), every=True, step=128):
                total += log_likelihood(chunk, ids[at : at + len(chunk)])
                at += len(chunk)
            count = len(text.encode())
            if self.spec.bos is None:
                count -= len(words.token_bytes(ids[0]))
            scores.append(Score(total, len(ids) - 1, count))
        return scores

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
    ) -> Generation | Stream:
        """Continue a prompt, answer a conversation, or continue token ids: give exactly one.

        The tokens that the prompt shares with the sequence in the cache are not computed again,
        so a chat only pays for its newest turn.

        Args:
            prompt: text to continue; an empty one starts from BOS.
            messages: conversation for the model's chat template, oldest first.
            token_ids: prompt as ids.
            max_new_tokens: at most this many, >= 0.
            temperature: 0 takes the likeliest token; with `top_p`, `top_k`, `min_p` and
                `repetition_penalty` as in `cpmcu.sampling.Sampling`.
            seed: of the draw; the same seed gives the same text. None draws anew each time.
            stop: strings that end the text; they are not part of it.
            stream: return a `Stream` of text pieces instead.

        Raises:
            ValueError: a value out of range, a prompt longer than the context, or logits that
                are not finite.
        """
        ids = self._prompt_ids(prompt, messages, token_ids)
        request = generation.Request.make(
            ids=ids, max_new_tokens=max_new_tokens, seed=seed, stop=stop, temperature=temperature,
            top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        self._checked(ids, start=0)
        running = generation.Running(self, request)
        pieces = Stream(running.pieces(), lambda: running.result)
        if not stream:
            list(pieces)
        return pieces if stream else pieces.result

    def reusable(self, ids: Sequence[int]) -> int:
        """How many leading tokens of `ids` need not be computed again (never all of them)."""
        if self.spec.rope.is_long(len(ids)) != self.spec.rope.is_long(len(self.tokens)):
            return 0  # LongRoPE: the cached keys were rotated by other angles
        count = 0
        for old, new in zip(self.tokens, ids[:-1], strict=False):
            if old != new:
                break
            count += 1
        return count

    def _prompt_ids(
        self, prompt: str | None, messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
    ) -> list[int]:  # fmt: skip
        given = {"prompt": prompt, "messages": messages, "token_ids": token_ids}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"give exactly one of prompt, messages, token_ids; got {names or 'none'}"
            )
        if prompt is not None:
            ids = self._words("prompt").encode(prompt)
        elif messages is not None:
            if not messages:
                raise ValueError("messages must hold at least one message")
            ids = self._words("messages").chat(messages)
        else:
            ids = [int(i) for i in token_ids or ()]
        if not ids and self.spec.bos is not None:
            ids = [self.spec.bos]
        return ids

    def _words(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this engine has none: use token_ids")
        return self.tokenizer

    def _checked(self, token_ids: Sequence[int], start: int | None = None) -> np.ndarray:
        """`token_ids` as int64, after the checks that spare an index beyond the table."""
        start = len(self.tokens) if start is None else start
        if not len(token_ids):
            complaint = "the prompt has no tokens, and the model has no BOS token to start from"
            raise ValueError(complaint)
        if start + len(token_ids) > self.max_context:
            limit = f"max_context={self.max_context} (the model's limit is {self.spec.max_context})"
            more = self.max_context < self.spec.max_context
            fix = "raise max_context or shorten it" if more else "shorten it"
            raise ValueError(
                f"the prompt has {start + len(token_ids)} tokens, above {limit}: {fix}"
            )
        ids = np.array(token_ids, np.int64)
        if int(ids.min()) < 0 or int(ids.max()) >= self.spec.vocab:
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(
                f"token id {bad} is outside the model's vocabulary of {self.spec.vocab}"
            )
        return ids

    def _iterate(
        self, ids: np.ndarray, *, every: bool, step: int | None = None
    ) -> Iterator[np.ndarray]:
        """Run `ids` in chunks after the present sequence; yield each chunk's logits."""
        step = step or self._decoder.chunk
        length = len(self.tokens) + len(ids)
        sparse = self.spec.sparse  # no chunk has both dense and sparse tokens
        dense = max(0, sparse.least_keys - 1 - len(self.tokens)) if sparse else len(ids)
        cuts = [*range(0, min(dense, len(ids)), step), *range(dense, len(ids), step)]
        for first, last in zip(cuts, [*cuts[1:], len(ids)], strict=True):
            chunk = ids[first:last]
            try:
                with self._model.turn:
                    result = self._forward(chunk, length, every)
            except BaseException:  # Ctrl-C in the middle of a chunk: the sequence stays what it was
                self._cache.length = len(self.tokens)
                raise
            self.tokens += chunk.tolist()
            yield result

    def _forward(self, chunk: np.ndarray, length: int, every: bool) -> np.ndarray:
        if self._decoder.device is None:
            return self._decoder.forward(chunk, self._cache, length=length, every=every)
        ids = torch.from_numpy(chunk)
        with thread_count.using(self._model.threads):
            return self._decoder.forward(ids, self._cache, length=length, every=every).numpy()
