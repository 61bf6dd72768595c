"""One engine in a process of its own, told over standard input what to do: for benchmarks/cpmcu.py.

    PYTHON benchmarks/cpmcu_worker.py ENGINE MODEL THREADS CONTEXT [OPTIONS AS JSON]

Runs under any Python that has the engine ("cpmcu", "llama", "openvino", "transformers"); needs
nothing else. Each line in is {"do": ...}, each line out the answer. Prompts are random tokens, new
ones every time: a prefix cache must not answer. Every engine has the same few methods:

    prefill(ids)        seconds until the logits after a new prompt are there
    decode(ids, steps)  seconds of `steps` single tokens after it
    logits(ids)         after a prompt, or None where they are not to be had
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import sys
import time


class Cpmcu:
    """This repository's engine."""

    def __init__(self, model: str, threads: int, context: int, **options) -> None:
        from cpmcu import Engine

        self.engine = Engine.from_pretrained(model, threads=threads, max_context=context, **options)
        self.vocab = self.engine.spec.vocab

    def prefill(self, ids: list[int]) -> float:  # noqa: D102 - above
        self.engine.reset()
        start = time.perf_counter()
        self.engine.feed(ids)  # as an array: nothing imports PyTorch
        return time.perf_counter() - start

    def decode(self, ids: list[int], steps: int) -> float:  # noqa: D102 - above
        self.prefill(ids)
        return self._steps(steps)

    def _steps(self, steps: int) -> float:
        token = 5
        for _ in range(3):
            token = int(self.engine.feed([token]).argmax())
        start = time.perf_counter()
        for _ in range(steps):
            token = int(self.engine.feed([token]).argmax())
        return time.perf_counter() - start

    def decode_filled(self, at: int, piece: list[int], steps: int) -> float:
        """Decoding after `at` tokens whose keys and values repeat those of `piece`."""
        engine, cache = self.engine, self.engine._cache
        if len(engine.tokens) < at:
            self.prefill(piece)
            cache.reserve(at)
            for arena in cache.layers:
                for first in range(len(piece), at, len(piece)):
                    last = min(at, first + len(piece))
                    arena[:, :, first:last] = arena[:, :, : last - first]
            engine.tokens[:] = [piece[i % len(piece)] for i in range(at)]
            done, cache.length = cache.kernels(), at
            for held, valid, wanted in zip(
                (cache.fine, cache.coarse), done, cache.kernels(), strict=True
            ):
                for arena in held:  # means of repeating keys repeat, but at the seams
                    for first in range(valid, wanted, valid):
                        last = min(wanted, first + valid)
                        arena[:, first:last] = arena[:, : last - first]
        engine.rollback(at)
        return self._steps(steps)

    def logits(self, ids: list[int]) -> list[float]:  # noqa: D102 - above
        self.engine.reset()
        return self.engine.feed(ids).tolist()


class Llama:
    """llama.cpp, by llama-cpp-python."""

    def __init__(
        self, model: str, threads: int, context: int, flash: bool = True, int8_cache: bool = False
    ) -> None:
        import llama_cpp

        self.api = llama_cpp
        kind = llama_cpp.GGML_TYPE_Q8_0 if int8_cache else llama_cpp.GGML_TYPE_F16
        self.llama = llama_cpp.Llama(
            model, n_ctx=context, n_batch=2048, n_ubatch=512, n_threads=threads,
            n_threads_batch=threads, flash_attn=flash, verbose=False, type_k=kind, type_v=kind,
        )  # fmt: skip
        self.vocab, self.filled = self.llama.n_vocab(), 0

    def _last(self):
        pointer = self.api.llama_get_logits_ith(self.llama.ctx, -1)
        import numpy as np

        return np.ctypeslib.as_array(pointer, shape=(self.vocab,))

    def _reset(self) -> None:
        self.filled = 0
        self.llama.reset()
        self.api.llama_memory_clear(self.api.llama_get_memory(self.llama.ctx), True)

    def prefill(self, ids: list[int]) -> float:  # noqa: D102 - above
        self._reset()
        start = time.perf_counter()
        self._eval(ids, 0)
        self._last()
        return time.perf_counter() - start

    def _eval(self, ids: list[int], past: int) -> None:
        """llama_decode itself: the wrapper copies logits into an array of the whole context."""
        for first in range(0, len(ids), 2048):
            piece = ids[first : first + 2048]
            batch = self.api.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i], batch.pos[i] = token, past + first + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = first + i == len(ids) - 1
            if code := self.api.llama_decode(self.llama.ctx, batch):
                raise RuntimeError(f"llama_decode: {code}")
            self.api.llama_batch_free(batch)

    def decode(self, ids: list[int], steps: int) -> float:  # noqa: D102 - above
        self.prefill(ids)
        return self._steps(len(ids), steps)

    def _steps(self, past: int, steps: int) -> float:
        token = 5
        for i in range(3):
            self._eval([token], past + i)
            token = int(self._last().argmax())
        start = time.perf_counter()
        for i in range(steps):
            self._eval([token], past + 3 + i)
            token = int(self._last().argmax())
        return time.perf_counter() - start

    def decode_filled(self, at: int, piece: list[int], steps: int) -> float:  # noqa: D102 - above
        ctx, api = self.llama.ctx, self.api
        memory = api.llama_get_memory(ctx)
        if self.filled != at:
            self.prefill(piece)
            size = api.llama_state_seq_get_size(ctx, 0)
            import ctypes

            blob = (ctypes.c_uint8 * size)()
            size = api.llama_state_seq_get_data(ctx, blob, size, 0)
            forged = tiled(bytes(blob[:size]), at)
            self._reset()
            buffer = (ctypes.c_uint8 * len(forged)).from_buffer_copy(forged)
            if not api.llama_state_seq_set_data(ctx, buffer, len(forged), 0):
                raise RuntimeError("llama.cpp refuses the filled cache")
            self.filled = at
        api.llama_memory_seq_rm(memory, 0, at, -1)
        return self._steps(at, steps)

    def logits(self, ids: list[int]) -> list[float]:  # noqa: D102 - above
        self.prefill(ids)
        return self._last().tolist()


def tiled(state: bytes, length: int) -> bytes:
    """A saved sequence of llama.cpp, its cells repeated to `length` positions.

    Written by llama_kv_cache::state_write: streams; cells; position and sequence of each; a flag
    (values transposed), layers; rows of keys of each layer; rows, or columns, of values.
    """
    at = 0

    def take(code: str):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, state, at)
        at += struct.calcsize(code)
        return value

    def put(code: str, value: int) -> None:
        out.append(struct.pack("<" + code, value))

    def repeat(row: bytes, item: int) -> bytes:
        count = len(row) // item
        return (row * (length // count) + row[: length % count * item])[: length * item]

    out: list[bytes] = [state[:8]]  # version, kind of the sequence
    at = 8
    streams, cells = take("I"), take("I")
    put("I", streams)
    put("I", length)
    for position in range(cells):
        found = take("i"), take("I"), take("i")
        assert streams == 1 and found == (position, 1, 0), "unknown layout of the state"
    for position in range(length):
        put("i", position)
        put("I", 1)
        put("i", 0)
    transposed, layers = take("I"), take("I")
    put("I", transposed)
    put("I", layers)
    for part in ("keys", "values"):
        for _ in range(layers):
            put("i", take("i"))
            if part == "values" and transposed:
                size, width = take("I"), take("I")
                put("I", size)
                put("I", width)
                for _ in range(width):
                    out.append(repeat(state[at : at + cells * size], size))
                    at += cells * size
                continue
            row = take("Q")
            put("Q", row)
            out.append(repeat(state[at : at + cells * row], row))
            at += cells * row
    assert at == len(state), f"{len(state) - at} bytes of the state are left over"
    return b"".join(out)


class OpenVINO:
    """OpenVINO GenAI; MODEL is a folder of optimum-intel."""

    def __init__(self, model: str, threads: int, context: int, **options) -> None:
        import openvino_genai

        self.api = openvino_genai
        self.pipe = openvino_genai.LLMPipeline(
            model, "CPU", INFERENCE_NUM_THREADS=threads, **options
        )
        with open(os.path.join(model, "config.json")) as file:
            self.vocab = json.load(file)["vocab_size"]

    def _run(self, ids: list[int], new: int) -> list[float]:
        """Seconds from the call until each new token."""
        import numpy as np
        import openvino

        row = np.array([ids], np.int64)
        tokens = self.api.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(np.ones_like(row)))
        config = self.api.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        start = time.perf_counter()
        result = self.pipe.generate(tokens, config)
        total = time.perf_counter() - start
        metrics = result.perf_metrics
        first = metrics.get_ttft().mean / 1000
        return [first, total]

    def prefill(self, ids: list[int]) -> float:  # noqa: D102 - above
        return self._run(ids, 1)[1]

    def decode(self, ids: list[int], steps: int) -> float:  # noqa: D102 - above
        first, total = self._run(ids, steps + 1)
        return total - first

    def logits(self, ids: list[int]) -> None:  # noqa: D102 - above
        return None  # not to be had: its rows are gated by our own


class Transformers:
    """transformers, in bfloat16."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.vocab = self.model.config.vocab_size

    def _forward(self, ids: list[int], past=None):
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids]), past_key_values=past, logits_to_keep=1)

    def prefill(self, ids: list[int]) -> float:  # noqa: D102 - above
        start = time.perf_counter()
        self._forward(ids)
        return time.perf_counter() - start

    def decode(self, ids: list[int], steps: int) -> float:  # noqa: D102 - above
        past = self._forward(ids).past_key_values
        for _ in range(2):
            out = self._forward([5], past)
        start = time.perf_counter()
        for _ in range(steps):
            out = self._forward([int(out.logits[0, -1].argmax())], past)
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> list[float]:  # noqa: D102 - above
        return self._forward(ids).logits[0, -1].float().tolist()


ENGINES = {"cpmcu": Cpmcu, "llama": Llama, "openvino": OpenVINO, "transformers": Transformers}


def peak_bytes() -> int:
    """Most memory this process ever had resident."""
    with open("/proc/self/status") as file:
        return next(int(li.split()[1]) * 1024 for li in file if li.startswith("VmHWM"))


def main() -> None:
    """Load, say how long it took, and answer until the input ends."""
    kind, model, threads, context = sys.argv[1:5]
    options = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    modules = {"cpmcu": "cpmcu.engine", "llama": "llama_cpp", "openvino": "openvino_genai"}
    __import__(modules.get(kind, kind))
    start = time.perf_counter()
    engine = ENGINES[kind](model, int(threads), int(context), **options)
    engine.prefill([1, 2, 3])
    answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
    generator = random.Random(os.getpid())

    def prompt(length: int) -> list[int]:
        return [generator.randrange(100, min(engine.vocab, 40_000)) for _ in range(length)]

    for line in sys.stdin:
        asked, answer = json.loads(line), {}
        try:
            if asked["do"] == "prefill":
                answer["seconds"] = engine.prefill(prompt(asked["tokens"]))
            elif asked["do"] == "decode":
                answer["seconds"] = engine.decode(prompt(asked["at"]), asked["steps"])
            elif asked["do"] == "filled":
                piece = [1000 + 7 * i for i in range(512)]
                answer["seconds"] = engine.decode_filled(asked["at"], piece, asked["steps"])
            elif asked["do"] == "logits":
                answer["logits"] = engine.logits(asked["ids"])
            elif asked["do"] == "peak":
                answer["bytes"] = peak_bytes()
        except Exception as error:  # noqa: BLE001 - told to the caller, who knows what to do
            answer["error"] = f"{type(error).__name__}: {error}"
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
