"""The engine: a model on a backend, and its first session."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cpmcu import backends, dtypes, plan, tokenizer, weight_sizes
from cpmcu import threads as thread_count
from cpmcu.loader import Progress, Source
from cpmcu.session import Loaded, Session
from cpmcu.sinks import FromSinks, Sinks
from cpmcu.sinks import load as load_sinks
from cpmcu.sparse import SparseAttention
from cpmcu.spec import ModelSpec
from cpmcu.tensors import load
from cpmcu.tokenizer import Tokenizer
from cpmcu.weights import Weights

log = logging.getLogger("cpmcu")


class Engine(Session):
    """A model, and a session on it; `session` opens others.

    Make one with `from_pretrained`, or from a spec, filled weights, and a tokenizer or
    what loads it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        tokenizer: Tokenizer | Callable[[], Tokenizer | None] | None = None,
        *,
        quant: str = "auto",
        sparse: str | SparseAttention = "auto",
        kv: str = "auto",
        backend: str = "auto",
        max_context: int | None = None,
        threads: int | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        spec = plan.resolve_spec(spec, sparse, kv)
        dtype = dtypes.name_of(weights.embedding.dtype)
        threads = thread_count.resolve(threads)
        backend, max_context = (
            backends.choose(backend, quant, spec, dtype),
            plan.check_context(max_context, spec),
        )
        quant = plan.resolve_quant(quant, dtype)
        loading = tokenizer if callable(tokenizer) else lambda: tokenizer
        made, words = backends.decoder(
            backend, quant, spec, weights, dtype, threads or thread_count.default(), max_context,
            loading,
        )  # fmt: skip
        if sinks is not None:
            made = FromSinks(made, sinks)
        super().__init__(
            Loaded(spec=spec, tokenizer=words, dtype=dtype, quant=quant, backend=backend,
                   decoder=made, max_context=max_context, threads=threads)
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = "auto",
        quant: str = "auto",
        sparse: str | SparseAttention = "auto",
        kv: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        memory_limit: int | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        """Load a model.

        Args:
            path: transformers folder (safetensors, or packed by bitcpm) or .gguf file.
            dtype: of weights and arithmetic, PyTorch's or its name: "float32", "bfloat16", on a
                GPU also "float16", or "auto" (bf16 on a GPU and where the CPU's kernels are no
                slower in it, else fp32).
            quant: weights in memory: a name of `dtype`, "int8" or "int4" (32 columns to a
                scale), "ternary" (weights that are ternary already, kept exactly; needs bitcpm);
                with the last two embedding and head have 8 bits, and with "ternary" matrices that
                are not. "auto": as a quantised or packed file has them, exactly; otherwise `dtype`.
            sparse: "auto" attends as the model's config.json says (InfLLM v2 where it has a
                `sparse_config`), "on" as MiniCPM4 does where it says nothing, "off" to all keys;
                or the sizes, `SparseAttention(...)`.
            kv: keys and values in memory: "auto" has `dtype`, "int8" one scale for a head of a
                token.
            backend: "gpu" (PyTorch and Triton), "cpu" (C++), "reference" (PyTorch), or "auto": the
                first that can run.
            threads: for every call of this engine; None takes PyTorch's number where that is
                imported, else OMP_NUM_THREADS, else one for each core. More than there are cores is
                lowered to that, with a warning.
            max_context: tokens the cache may hold; None takes the model's limit, or what fits in
                `memory_limit`.
            memory_limit: bytes for weights, cache and activations together, of the GPU's memory
                where that runs the model; None sets none.
            progress: called as progress(done, total) while loading.

        Raises:
            FileNotFoundError: no model, or no weights, at `path`.
            ValueError: a file is damaged or of an unknown kind, an option is not supported, or
                the model does not fit in `memory_limit`.
            ImportError: what is asked for needs PyTorch or bitcpm, and it is not installed.
        """
        source = Source(path)
        spec = plan.resolve_spec(source.spec, sparse, kv)
        compute = backends.resolve_dtype(dtype, backend, quant, spec)
        stored = backends.stored_quant(source, backend, spec, compute)
        quant = plan.resolve_quant(quant, compute, stored)
        chosen = backends.choose(backend, quant, spec, compute)  # before memory is taken
        if memory_limit is not None:
            size, _ = weight_sizes.of_source(source, quant, compute, chosen)
            max_context = plan.fit_context(spec, compute, max_context, memory_limit, quant,
                                           chosen, size)  # fmt: skip
        max_context = plan.check_context(max_context, spec)
        keep = stored is not None and quant == stored
        weights = load(source, compute, codes=keep, native=chosen == "cpu", progress=progress)
        words = partial(tokenizer.load, source)  # while the weights are laid out: it takes as long
        engine = cls(spec, weights, words, quant=quant, sparse=spec.sparse or "off", kv=kv,
                     backend=chosen, max_context=max_context, threads=threads,
                     sinks=load_sinks(source))  # fmt: skip
        log.info("%s: backend %s, %s weights, %s, %s attention, %d tokens of context", path,
                 engine.backend, engine.quant, compute,
                 "sparse" if spec.sparse else "dense", max_context)  # fmt: skip
        return engine

    def session(self) -> Session:
        """Another sequence on this model, with a cache of its own."""
        return Session(self._model)
