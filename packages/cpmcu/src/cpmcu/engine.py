"""The engine: a model, its tokenizer and one sequence's cache, behind a few calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpmcu import backends, generation, plan, tokenizer
from cpmcu import threads as thread_count
from cpmcu.cache import KVCache
from cpmcu.loader import Progress, Source
from cpmcu.results import Generation, Score, Stream
from cpmcu.spec import ModelSpec
from cpmcu.tensors import load_codes
from cpmcu.tokenizer import Message, Tokenizer
from cpmcu.weights import Weights

log = logging.getLogger("cpmcu")


class Engine:
    """Runs one model on one sequence at a time. Not for concurrent calls from several threads.

    `spec`, `tokenizer` (None: token ids only), `dtype`, `max_context`, and `tokens`, the ids now
    in the cache. Make one with `from_pretrained`, or from a spec and filled weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        tokenizer: Tokenizer | None = None,
        *,
        quant: str = "auto",
        backend: str = "auto",
        max_context: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.dtype = weights.embedding.dtype
        self.backend = backends.choose(backend, quant, spec, self.dtype)
        self.max_context = plan.check_context(max_context, spec)
        self.threads = thread_count.resolve(threads)
        self.quant = plan.resolve_quant(quant, self.dtype)
        self._cache = KVCache(spec, self.dtype, self.max_context)
        self._decoder = backends.decoder(
            self.backend, self.quant, spec, weights, self.threads or torch.get_num_threads()
        )
        self.tokens: list[int] = []

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        quant: str = "auto",
        sparse: str = "off",
        backend: str = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        memory_limit: int | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        """Load a model.

        Args:
            path: transformers folder (safetensors, or packed by bitcpm) or .gguf file.
            dtype: of weights and arithmetic: "float32", "bfloat16", or "auto" (bf16 where the
                processor multiplies it natively, else fp32).
            quant: weights in memory: "float32", "bfloat16", "int8" or "int4" (32 columns to a
                scale; with int4 embedding and head have 8 bits). "auto": as a quantised file has
                them, exactly; otherwise `dtype`.
            sparse: "off". Sparse attention is not in the engine yet.
            backend: "cpu" (C++), "reference" (PyTorch), or "auto": the first that can run.
            threads: for every call of this engine; None leaves PyTorch's number alone. More than
                there are cores is lowered to that, with a warning.
            max_context: tokens the cache may hold; None takes the model's limit, or what fits in
                `memory_limit`.
            memory_limit: bytes for weights, cache and activations together; None sets none.
            progress: called as progress(done, total) while loading.

        Raises:
            FileNotFoundError: no model, or no weights, at `path`.
            ValueError: a file is damaged or of an unknown kind, an option is not supported, or
                the model does not fit in `memory_limit`.
        """
        if sparse != "off":
            raise ValueError(f"sparse={sparse!r} is not implemented yet, use 'off'")
        source = Source(path)
        spec, compute = source.spec, plan.resolve_dtype(dtype)
        native = backends.choose(backend, "auto", spec, compute) == "cpu"
        quant = plan.resolve_quant(quant, compute, source.quant if native else None)
        if memory_limit is not None:
            max_context = plan.fit_context(spec, compute, max_context, memory_limit, quant)
        max_context = plan.check_context(max_context, spec)
        backends.choose(backend, quant, spec, compute)  # before memory is taken
        words = tokenizer.load(source)
        keep = native and quant == source.quant
        weights = (load_codes if keep else Source.load)(source, compute, progress)
        engine = cls(spec, weights, words, quant=quant, backend=backend, max_context=max_context,
                     threads=threads)  # fmt: skip
        log.info("%s: backend %s, %s weights, %s, %d tokens of context", path, engine.backend,
                 engine.quant, compute, max_context)  # fmt: skip
        return engine

    def reset(self) -> None:
        """Forget the sequence."""
        self.rollback(0)

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens; ValueError outside 0..len(tokens)."""
        if not 0 <= length <= len(self.tokens):
            raise ValueError(f"length must be in 0..{len(self.tokens)} (tokens held), got {length}")
        del self.tokens[length:]
        self._cache.length = length

    def prefill(self, token_ids: Sequence[int]) -> Tensor:
        """Append tokens to the sequence; the logits after the last, fp32 [vocab].

        Raises:
            ValueError: no tokens, an id outside the vocabulary, or more than the context holds.
        """
        return self._run(token_ids, every=False)[-1]

    def decode(self, token_id: int) -> Tensor:
        """Append one token; the logits after it, fp32 [vocab]."""
        return self._run([token_id], every=False)[-1]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of a new sequence, fp32 [len(token_ids), vocab]."""
        self.reset()
        return torch.cat(self._run(token_ids, every=True))

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
                targets = torch.tensor(ids[at : at + len(chunk)])
                total += float(-torch.nn.functional.cross_entropy(chunk, targets, reduction="sum"))
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
            ids=ids,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        self._checked(ids, start=0)
        running = generation.Running(self, request)
        pieces = Stream(running.pieces(), lambda: running.result)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.result

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
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
    ) -> list[int]:
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

    def _checked(self, token_ids: Sequence[int], start: int | None = None) -> Tensor:
        """`token_ids` as a tensor, after the checks that spare PyTorch an index error."""
        start = len(self.tokens) if start is None else start
        if not len(token_ids):
            raise ValueError(
                "the prompt has no tokens, and the model has no BOS token to start from"
            )
        if start + len(token_ids) > self.max_context:
            limit = f"max_context={self.max_context} (the model's limit is {self.spec.max_context})"
            more = self.max_context < self.spec.max_context
            fix = "raise max_context or shorten it" if more else "shorten it"
            raise ValueError(
                f"the prompt has {start + len(token_ids)} tokens, above {limit}: {fix}"
            )
        ids = torch.tensor(token_ids, dtype=torch.int64)
        if int(ids.min()) < 0 or int(ids.max()) >= self.spec.vocab:
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(
                f"token id {bad} is outside the model's vocabulary of {self.spec.vocab}"
            )
        return ids

    def _run(self, token_ids: Sequence[int], *, every: bool) -> list[Tensor]:
        return list(self._iterate(self._checked(token_ids), every=every))

    def _iterate(self, ids: Tensor, *, every: bool, step: int = plan.CHUNK) -> Iterator[Tensor]:
        """Run `ids` in chunks after the present sequence; yield each chunk's logits."""
        length = len(self.tokens) + len(ids)
        for chunk in ids.split(step):
            try:
                with thread_count.using(self.threads):
                    result = self._decoder.forward(chunk, self._cache, length=length, every=every)
            except BaseException:  # Ctrl-C in the middle of a chunk: the sequence stays what it was
                self._cache.length = len(self.tokens)
                raise
            self.tokens += chunk.tolist()
            yield result
