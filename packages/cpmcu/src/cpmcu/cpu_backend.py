"""The decoder in native code: a list of records, built once, that threads go through per token.

The list reads like the model (`_layer`). What changes between calls is one small structure that
all arguments point to, so no Python runs inside of a token.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from cpmcu import cpu_library as c
from cpmcu import cpu_ternary, dtypes, huge_pages
from cpmcu.cache import KVCache
from cpmcu.cpu_ternary import TernaryWeights
from cpmcu.cpu_weights import PackedMatrix
from cpmcu.int8_rows import SCALE_BYTES
from cpmcu.rope import RopeTable
from cpmcu.sparse import COARSE_FACTOR
from cpmcu.spec import ModelSpec
from cpmcu.weights import Layer, Weights

_BLOCK = 48  # packed rows come in blocks of 12 or 16
_MOST_COLUMNS, _MOST_HEAD = 1 << 15, 2048  # what a thread's stack holds


def is_supported(spec: ModelSpec, dtype: str) -> tuple[bool, str]:
    """Whether this backend can run `spec` in `dtype`, and why not."""
    dtype = dtypes.name_of(dtype)
    library, reason = c.kernels()
    if library is None:
        return False, reason
    if dtype not in c.DTYPES:
        return False, f"needs float32 or bfloat16, got {dtype}"
    if spec.window is not None and spec.sparse:
        return False, "sparse attention in a model with sliding windows is not implemented"
    if max(spec.hidden, spec.ffn, spec.heads * spec.head_dim) > _MOST_COLUMNS:
        return False, f"matrices of more than {_MOST_COLUMNS} columns"
    if spec.head_dim > _MOST_HEAD:
        return False, f"heads of more than {_MOST_HEAD}"
    return True, ""


class Decoder:
    """A model ready to run: `forward` appends tokens to a cache and returns logits.

    Args:
        spec: the model.
        weights: from `cpu_weights.pack_model`.
        dtype: of keys and values.
        pool: threads, this decoder's own.
        chunk: tokens of a call, at most.
        max_context: tokens of a cache, at most.
    """

    device = None  # none of PyTorch's: its caches are NumPy's

    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: str, pool: c.Pool,
        chunk: int, max_context: int,
    ) -> None:  # fmt: skip
        self._library, self.spec, self.weights = c.loaded(), spec, weights
        self.dtype, self.pool = dtypes.name_of(dtype), pool
        self.chunk, self._max_context = chunk, max_context
        self._rope = RopeTable(spec.rope, spec.head_dim)
        self._kept: list[Any] = []  # memory that arguments point into
        self._step = c.Step()
        self._at = ctypes.addressof(self._step)
        self._packs: dict[tuple[int, int, int], Any] = {}
        self._rows: dict[int, np.ndarray] = {}
        dtype = self.dtype
        self._x = self._floats(spec.hidden)
        self._qkv = self._floats(spec.qkv_rows)
        self._gate_up = self._floats(max(2 * spec.ffn, spec.hidden))
        self._q, self._out = (
            self._room(chunk, spec.heads * spec.head_dim, dtype) for _ in range(2)
        )
        matrices = [m for x in weights.layers for m in (x.qkv, x.output, x.gate_up, x.down)]
        own = [m for m in (*matrices, weights.head) if isinstance(m, PackedMatrix)]
        self._work_size = max(self._library.size("multiply_work", m.struct) for m in own)
        self._work = self._room(pool.threads, self._work_size, "uint8")
        # Ternary products: bitcpm's records, which want to be told the number of tokens.
        self._ternary: list[Any] = []
        self._ternary_tokens = 0
        foreign = [m for m in matrices if not isinstance(m, PackedMatrix)]
        sizes = [cpu_ternary.scratch_bytes(m, chunk, pool.threads) for m in foreign]
        self._scratch = self._room(1, max(sizes, default=0), "uint8")
        self._attention = self._shared_attention()
        self._caches: list[tuple[Any, Any, Any]] = []
        steps = [
            ("embed", c.EmbedArgs(self._at, weights.embedding.struct, c.address(self._x),
                                  spec.embed_scale, 0)),
        ]  # fmt: skip
        for layer in weights.layers:
            steps += self._layer(layer)
        steps += self._norm(weights.norm, weights.head, scale=spec.logit_scale, last=True)
        self._head = self._arguments(weights.head, None, last=True)
        steps.append(("multiply", self._head))
        self._records = c.Records(steps)
        self._bound: object = None

    def _layer(self, layer: Layer) -> list[tuple[str | int, Any]]:
        spec = self.spec
        rotate = c.RotateArgs(
            self._at, c.address(self._qkv), c.address(layer.q_norm), c.address(layer.k_norm),
            c.address(self._q), None, None, spec.heads, spec.kv_heads, spec.head_dim, 0,
            spec.rms_eps, c.DTYPES[self.dtype], spec.int8_cache, 0,
        )  # fmt: skip
        attend, compress = c.AttendArgs(self._at, *self._attention), self._compression()
        self._caches.append((rotate, attend, compress))
        sparse = [("compress", compress), ("select", attend)] if spec.sparse else []
        attended, hidden = self._packed(layer.output), self._packed(layer.down)
        return [
            *self._norm(layer.attention_norm, layer.qkv),
            *self._multiply(layer.qkv, self._qkv, bias=layer.qkv_bias),
            ("rotate", rotate),
            *sparse,
            ("attend", attend),
            ("merge", attend),
            ("pack", c.PackArgs(self._at, c.address(self._out), attended, spec.heads,
                                spec.head_dim, c.DTYPES[self.dtype], 0)),
            *self._multiply(layer.output, self._x, add=spec.residual_scale),
            *self._norm(layer.ffn_norm, layer.gate_up),
            *self._multiply(layer.gate_up, self._gate_up, gated=hidden),
            ("swiglu", c.SwigluArgs(self._at, c.address(self._gate_up), hidden,
                                    layer.gate_up.struct)),
            *self._multiply(layer.down, self._x, add=spec.residual_scale),
        ]  # fmt: skip

    def _norm(
        self,
        weight: np.ndarray,
        reader: PackedMatrix | TernaryWeights,
        *,
        scale: float = 1.0,
        last: bool = False,
    ) -> list[tuple[str | int, Any]]:
        args = c.NormArgs(
            self._at, c.address(self._x), c.address(weight), self._packed(reader),
            self.spec.rms_eps, scale, last, 0,
        )  # fmt: skip
        return [("norm", args)]

    def _multiply(
        self, matrix: PackedMatrix | TernaryWeights, out: np.ndarray, *,
        bias: np.ndarray | None = None, add: float | None = None, gated: Any = None,
    ) -> list[tuple[str | int, Any]]:  # fmt: skip
        """out = the product (or swiglu of it, to `gated`), + bias; or out += add * the product."""
        if isinstance(matrix, PackedMatrix):
            args = self._arguments(matrix, out, bias=bias, add=add)
            args.gated = gated or c.Packed()
            return [("multiply", args)]
        rows, cols = matrix.matrix.shape
        self._packed(matrix)
        x = self._rows[cols].reshape(self.chunk, cols)
        # What is added passes through memory that no one needs at that moment.
        result = (out if add is None else self._gate_up[: self.chunk * rows]).reshape(-1, rows)
        product = cpu_ternary.product(matrix, x, result, self._scratch, self.pool.threads, bias)
        self._ternary.append(product)
        if add is None:
            return product.steps
        adding = c.AddArgs(self._at, c.address(result), c.address(out), rows, add, 0)
        return [*product.steps, ("add", adding)]

    def _arguments(
        self, matrix: PackedMatrix, out: np.ndarray | None, *, bias: np.ndarray | None = None,
        add: float | None = None, last: bool = False,
    ) -> Any:  # fmt: skip
        return c.MultiplyArgs(
            self._at, matrix.struct, self._packed(matrix), c.address(out), c.address(bias),
            c.address(self._work), self._work_size, 1.0 if add is None else add, add is not None,
            last, 0, c.Packed(),
        )  # fmt: skip

    def _packed(self, reader: PackedMatrix | TernaryWeights) -> Any:
        """Rows as `reader` wants them. One buffer for each width and kind, for at most one is in
        use at any time.
        """
        m = reader.struct
        key = m.cols, m.kind, m.group
        if key not in self._packs:
            if m.kind == c.ROWS:
                rows = self._rows[m.cols] = self._room(self.chunk, m.cols, "float32")
                self._packs[key] = c.Packed(c.address(rows), None, None, None, m.cols, m.kind, 0)
                return self._packs[key]
            tokens, integers = -(-self.chunk // _BLOCK) * _BLOCK, m.kind in (c.INT8, c.INT4)
            groups = m.cols // m.group if integers else 0
            size = 4 if m.kind == c.FLOAT32 else 2  # integers too: in bfloat16, in tiles
            data = self._room(tokens, m.cols * size, "uint8")
            scales = self._room(tokens, groups, "float32")
            offsets = self._room(tokens, groups, "int32")
            zeros = self._room(tokens, groups, "int32")
            self._packs[key] = c.Packed(
                *(c.address(part) for part in (data, scales, offsets, zeros)),
                m.cols, m.kind, m.group,
            )  # fmt: skip
        return self._packs[key]

    def _shared_attention(self) -> tuple[Any, Any, int]:
        """What all layers' attention has in common: dense or over blocks, selection, from where."""
        spec, sparse = self.spec, self.spec.sparse
        D, K, threads = spec.head_dim, spec.kv_heads, self.pool.threads
        shape = c.Shape(1, K, spec.heads // K, self.chunk, self._max_context, D,
                        c.DTYPES[self.dtype], spec.int8_cache)  # fmt: skip
        view = c.TensorView(None, 0, 0, D)
        keys = c.TensorView(None, 0, 0, D + spec.int8_cache * SCALE_BYTES)
        attend = c.NativeAttend(
            shape, c.TensorView(c.address(self._q)), keys, keys, None,
            sparse.budget if sparse else 0, c.address(self._out), None, None, 0, None, 1, 1,
            sparse.block_size if sparse else 64, D**-0.5, spec.window or 0,
        )  # fmt: skip
        attend.work_stride = size = self._library.size("attend_work", attend)
        attend.work = c.address(self._room(threads, size, "uint8"))
        floats = self._library.size("partial_floats", shape)
        attend.partial = c.address(self._room(1, floats, "float32"))
        if sparse is None:
            return attend, c.NativeSelect(), 1 << 62
        selection = c.Selection(
            sparse.kernel_size, sparse.kernel_stride, COARSE_FACTOR, sparse.block_size,
            sparse.init_blocks, sparse.window_blocks, sparse.budget, 0, D**-0.5, 0,
        )  # fmt: skip
        blocks = self._room(K, sparse.budget, "int32")
        select = c.NativeSelect(shape, selection, view, view, view, c.address(blocks), None, 0)
        select.work_stride = size = self._library.size("select_work", select)
        select.work = c.address(self._room(threads, size, "uint8"))
        return attend, select, sparse.least_keys

    def _compression(self) -> Any:
        spec, sparse = self.spec, self.spec.sparse
        if sparse is None:
            return None
        view = c.TensorView(None, 0, 0, spec.head_dim)
        keys = c.TensorView(None, 0, 0, spec.head_dim + spec.int8_cache * SCALE_BYTES)
        return c.CompressArgs(
            self._at,
            c.NativeCompress(
                keys, view, view, 1, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, sparse.kernel_size,
                sparse.kernel_stride, COARSE_FACTOR, c.DTYPES[self.dtype], spec.int8_cache, 0,
            ),
        )  # fmt: skip

    @property
    def activation_bytes(self) -> int:
        """Bytes laid out besides weights and cache."""
        return sum(memory.nbytes for memory in self._kept)

    def _floats(self, width: int) -> np.ndarray:
        return self._room(self.chunk, width, "float32")

    def _room(self, rows: int, width: int, dtype: str) -> np.ndarray:
        """Memory on a 64-byte boundary, alive as long as this object."""
        memory = huge_pages.aligned(rows * width * dtypes.size_of(dtype))
        self._kept.append(memory)
        return memory.view(dtypes.STORED[dtype])

    def _bind(self, cache: KVCache) -> None:
        """Point the layers at the cache's memory, if it has moved."""
        if cache.place is self._bound:
            return

        def bind(view: Any, rows: np.ndarray) -> None:
            view.data, view.head = c.address(rows), rows.shape[1] * rows.shape[2]

        for i, (rotate, attend, compress) in enumerate(self._caches):
            k, v = cache.layers[i]
            rotate.k, rotate.v, rotate.room = c.address(k), c.address(v), k.shape[1]
            bind(attend.attend.k, k), bind(attend.attend.v, v)
            if compress is not None:
                bind(compress.compress.keys, k)
                for user in (attend.select, compress.compress):
                    bind(user.fine, cache.fine[i]), bind(user.coarse, cache.coarse[i])
        self._bound = cache.place

    def forward(
        self, tokens: np.ndarray, cache: KVCache, *, length: int = 0, every: bool = False
    ) -> np.ndarray:
        """Run `tokens` (int64 [T], 1 <= T <= chunk) after those in `cache`, and append them to it.

        Args and returns: as `reference.Decoder.forward`, but that all are NumPy's.
        """
        spec, step, start = self.spec, self._step, cache.length
        tokens = np.ascontiguousarray(tokens, np.int64)
        end = start + len(tokens)
        cache.reserve(end)
        self._bind(cache)
        cos, sin = self._rope.rows(start, end, length=max(end, length))
        logits = np.empty((len(tokens) if every else 1, spec.vocab), np.float32)
        step.tokens, step.start, step.every = len(tokens), start, every
        step.ids, step.cos, step.sin = c.address(tokens), c.address(cos), c.address(sin)
        self._head.out = c.address(logits)
        if len(tokens) != self._ternary_tokens:
            for product in self._ternary:
                product.set_tokens(len(tokens))
            self._ternary_tokens = len(tokens)
        self.pool.run(self._records)
        cache.length = end
        return logits if every else logits[0]
