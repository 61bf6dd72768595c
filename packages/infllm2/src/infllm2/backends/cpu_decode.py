"""One token through a cache, in one native call: append, compress, select, attend.

A step over a long context reads more memory than the processor's caches hold, so the Python that
comes next runs cold and costs several times what it costs alone: 0.1 ms and more along the general
path, half of what attention itself takes. Here the arguments are made once, and a step only writes
what has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm2.backends.cpu_library import (
    DTYPES,
    AppendArgs,
    AttendArgs,
    CompressArgs,
    RunArgs,
    SelectArgs,
    kernels,
    selection_of,
    shape_of,
    strided,
)
from infllm2.compression import kernel_counts
from infllm2.config import COARSE_FACTOR, InfLLMv2Config
from infllm2.layer_cache import LayerCache


class DecodeStep:
    """A decoding step on one cache, ready to run.

    Args:
        store: the cache; it holds tokens already.
        q: queries of such a step, `[B, Hq, 1, D]`, float32 or bfloat16 on the CPU.
        config: sizes and budget.
        backend: the name the caller asks for.
        dense_below: contexts of fewer keys are dense.
    """

    def __init__(
        self, store: LayerCache, q: Tensor, config: InfLLMv2Config, backend: str, dense_below: int
    ) -> None:
        library = kernels()[0]
        keys, values = store.key_buffer, store.value_buffer
        assert library is not None and keys is not None and values is not None
        self._library, self._threads = library, torch.get_num_threads()
        self._config, self._backend = config, backend
        self._keys, self._values = keys, values
        (B, _, _, D), (K, room) = q.shape, keys.shape[1:3]
        self._q_shape, self._kv_shape = q.shape, torch.Size((B, K, 1, D))
        self._shape, self._dtype = shape_of(q, K, room), q.dtype
        row = (D, D)  # strides of heads and rows of new tokens, which are contiguous
        self._append = AppendArgs(
            None, K * D, *row, None, K * D, *row, *strided(keys), *strided(values), B, K, 1, D, 0,
            DTYPES[q.dtype], 0,
        )  # fmt: skip
        # Up to the budget all blocks are visited, and dense attention gives the same.
        dense_below = max(dense_below, config.budget * config.block_size + 1)
        sparse = store.length + 1 >= dense_below
        # It serves as long as no more tokens are held, the new one included, and no fewer.
        self._most, self._least = (room, dense_below) if sparse else (dense_below - 1, 0)
        self._most = min(self._most, room)
        self._made, self._select = None, None
        if sparse:
            self._prepare_sparse(store)
        else:
            self._attend = self._attention(None, 0)
            steps = [(library.append, self._append, 1), *self._attention_steps()]
            self._plain = self._compressing = library.steps(steps)

    def _prepare_sparse(self, store: LayerCache) -> None:
        store.compressed()
        self._made = made = store.kernels
        assert made is not None and made.fine is not None and made.coarse is not None
        self._fine, coarse, config = made.fine, made.coarse, self._config
        B, K, _, D = self._kv_shape
        self._size, self._stride = config.kernel_size, config.kernel_stride
        # As long as the buffers of compressed keys suffice.
        for buffer, factor in ((self._fine, 1), (coarse, COARSE_FACTOR)):
            room = factor * (self._size + buffer.shape[2] * self._stride) - 1
            self._most = min(self._most, room)
        self._compress = CompressArgs(
            *strided(self._keys), *strided(self._fine), *strided(coarse), B, K, D, 0, 0, 0, 0,
            self._size, self._stride, COARSE_FACTOR, DTYPES[self._dtype],
        )  # fmt: skip
        self._blocks = torch.empty(B, K, 1, config.budget, dtype=torch.int32)
        selection, library = selection_of(config, D), self._library
        work = library.sizes(self._shape, selection=selection)[0]
        heads = self._q_shape[1]
        select = SelectArgs(
            *self._shape, *selection, None, heads * D, D, D, *strided(self._fine),
            *strided(coarse), self._blocks.data_ptr(), None, work,
        )  # fmt: skip
        attend = self._attention(self._blocks, self._threads * work)
        # One structure for both, and views of its parts.
        run = RunArgs(select, attend)
        self._select, self._attend = run.select, run.attend
        if attend.splits == 1:
            rest = [(library.run, run, self._threads)]
        else:  # too few heads to go round: the blocks of each are shared out
            rest = [(library.select, self._select, self._threads), *self._attention_steps()]
        append = (library.append, self._append, 1)
        self._plain = library.steps([append, *rest])
        self._compressing = library.steps([append, (library.compress, self._compress, 1), *rest])

    def _attention(self, blocks: Tensor | None, before: int) -> AttendArgs:
        """Arguments of attention over all keys, or the listed blocks; its scratch memory begins
        `before` bytes behind the start.
        """
        B, H, _, D = self._q_shape
        units = B * self._kv_shape[1]
        _, work, floats = self._library.sizes(self._shape, self._config.block_size)
        splits = 1 if units % self._threads == 0 or units >= 4 * self._threads else self._threads
        self._partial = torch.empty(units * splits * floats if splits > 1 else 0)
        self._before, self._scratch = before, before + self._threads * work
        return AttendArgs(
            *self._shape, None, H * D, D, D, *strided(self._keys), *strided(self._values),
            None if blocks is None else blocks.data_ptr(), self._config.budget, None, None, None,
            work, self._partial.data_ptr() if splits > 1 else None, splits, 1,
            self._config.block_size, D**-0.5,
        )  # fmt: skip

    def _attention_steps(self) -> list[tuple[Any, Any, int]]:
        steps = [(self._library.attend, self._attend, self._threads)]
        if self._attend.splits > 1:
            steps.append((self._library.merge, self._attend, self._threads))
        return steps

    def fits(
        self, store: LayerCache, q: Tensor, k: Tensor, v: Tensor, config: InfLLMv2Config,
        backend: str,
    ) -> bool:  # fmt: skip
        """Whether this is the step for these inputs, which are then known to be right."""
        made, dtype = self._made, self._dtype
        return (
            self._least <= store.length + 1 <= self._most
            and q.shape == self._q_shape
            and k.shape == self._kv_shape
            and v.shape == self._kv_shape
            and q.dtype is dtype
            and k.dtype is dtype
            and v.dtype is dtype
            and q.is_cpu
            and k.is_cpu
            and v.is_cpu
            and not (q.requires_grad or k.requires_grad or v.requires_grad)
            and store.key_buffer is self._keys
            and (made is None or (store.kernels is made and made.fine is self._fine))
            and backend == self._backend
            and (config is self._config or config == self._config)
            and torch.get_num_threads() == self._threads
        )

    def run(self, store: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v, and attend: `[B, Hq, 1, D]`."""
        append, attend, select, made = self._append, self._attend, self._select, self._made
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        query, scratch = q.data_ptr(), self._library.scratch(self._scratch)
        length = store.length + 1
        append.new_k, append.new_v, append.at = k.data_ptr(), v.data_ptr(), length - 1
        attend.q, attend.out, attend.keys = query, out.data_ptr(), length
        attend.work = scratch + self._before
        steps = self._plain
        if select is not None:
            select.q, select.keys, select.work = query, length, scratch
            behind = length - made.length != 1
            if behind or (length - self._size) % self._stride == 0:  # a compressed key is complete
                compress, steps = self._compress, self._compressing
                compress.fine_begin, compress.coarse_begin = kernel_counts(
                    made.length, self._config
                )
                compress.fine_end, compress.coarse_end = kernel_counts(length, self._config)
            steps()
            made.length = length
        else:
            steps()
        store.length = length
        return out
