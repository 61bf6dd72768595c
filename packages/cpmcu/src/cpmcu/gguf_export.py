"""A model as a GGUF file that llama.cpp loads: hyper-parameters, tokenizer, tensors.

Codes of 4 and 8 bits go into Q4_0 and Q8_0 as they are. One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu import gguf_codes, gguf_vocab
from cpmcu._files import atomic_path
from cpmcu._torch import torch
from cpmcu.codes import nearest
from cpmcu.loader import Progress, Source
from cpmcu.rope import Rope
from cpmcu.spec import ModelSpec
from cpmcu.spec_gguf import gguf_name, interleaved_heads, pairs
from cpmcu.tensors import Tensors

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("auto", "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "TQ2_0")
_FILE_TYPE = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "TQ2_0": 37}
_ARCHITECTURE = {"mistral": "llama", "minicpm4": "minicpm"}


@dataclass(slots=True)
class Exported:
    """What was written.

    `kinds` counts tensors by ggml's types; `errors` has ||W - W'|| / ||W|| of each tensor that was
    rounded on the way, by its name in the file.
    """

    path: str
    kinds: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def export_gguf(
    source: Source, out: Path, kind: str = "auto", progress: Progress | None = None
) -> Exported:
    """Write `source` as the GGUF file `out`, atomically.

    Args:
        source: any model.
        out: file to write.
        kind: type of the matrices, of `KINDS`. "auto": codes as they are (Q4_0, Q8_0), matrices of
            {-a, 0, a} as TQ2_0 where their rows fill its blocks, bfloat16 as BF16, others as F16.
            With Q4_0, Q4_1 and TQ2_0 embedding and head are Q8_0. Vectors are F32.
        progress: called with (tensors done, tensors in all).

    Raises:
        ValueError: `kind` is unknown or does not fit a matrix, or llama.cpp does not know the
            tokenizer or the rotary scaling.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    if kind not in KINDS:
        raise ValueError(f"type must be one of {', '.join(KINDS)}, got {kind!r}")
    spec = source.spec
    architecture = _ARCHITECTURE.get(spec.architecture, spec.architecture)
    made, names = Exported(str(out)), list(spec.tensors())
    with Tensors(source) as tensors, atomic_path(out) as target:
        chosen = {n: _choose(tensors, n, kind) for n in names}
        writer = GGUFWriter(target, architecture)
        _write_spec(writer, spec, architecture)
        _write_vocabulary(writer, source)
        inner = [k for n, k in chosen.items() if n.startswith("layers.") and k != "F32"]
        writer.add_file_type(_FILE_TYPE[max(set(inner or ["F32"]), key=inner.count)])
        writer.add_quantization_version(2)
        extra = list(_factors(spec))
        for name, values in extra:
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for name in names:
            shape, wanted = spec.tensors()[name], GGMLQuantizationType[chosen[name]]
            row = _row_bytes(shape[-1], chosen[name])
            size = row * int(np.prod(shape[:-1], dtype=np.int64))
            raw = chosen[name] not in ("F32", "F16")
            given = (*shape[:-1], row) if raw else shape
            kind_of = np.uint8 if raw else np.float32 if chosen[name] == "F32" else np.float16
            writer.add_tensor_info(gguf_name(name), given, np.dtype(kind_of), size, wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values in extra:
            writer.write_tensor_data(values)
        for done, name in enumerate(names, start=1):
            data, error = _data(tensors, name, chosen[name], spec, architecture)
            writer.write_tensor_data(np.ascontiguousarray(data))
            made.kinds[chosen[name]] = made.kinds.get(chosen[name], 0) + 1
            if error:
                made.errors[gguf_name(name)] = error
            if progress is not None:
                progress(done, len(names))
        writer.close()
        made.bytes = target.stat().st_size
    return made


def _row_bytes(columns: int, kind: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if columns % block:
        raise ValueError(
            f"{kind} holds rows of whole blocks of {block} weights, and the model has rows of "
            f"{columns}: take another type"
        )
    return columns // block * size


def _choose(tensors: Tensors, name: str, kind: str) -> str:
    """The type of one tensor."""
    if len(tensors.spec.tensors()[name]) == 1:
        return "F32"
    if kind in ("Q4_0", "Q4_1", "TQ2_0") and not name.startswith("layers."):
        return "Q8_0"
    if kind != "auto":
        return kind
    matrix = tensors.codes(name)
    if matrix is not None:
        return "Q4_0" if matrix.bits == 4 else "Q8_0"
    values = tensors.read(name)
    if tensors.source.kind == "ternary" and values.shape[1] % 256 == 0 and _ternary(values):
        return "TQ2_0"
    if values.dtype == torch.bfloat16:
        return "BF16"
    return "F16" if float(values.abs().max()) < 65504 else "BF16"


def _ternary(values: Tensor) -> bool:
    """Whether each 256 weights of a row are {-a, 0, a} with a float16 a."""
    blocks = values.float().unflatten(1, (-1, 256))
    largest = blocks.abs().amax(-1, keepdim=True)
    known = (blocks == 0) | (blocks.abs() == largest)
    return bool(known.all()) and torch.equal(largest.half().float(), largest)


def _data(
    tensors: Tensors, name: str, kind: str, spec: ModelSpec, architecture: str
) -> tuple[np.ndarray, float]:
    """A tensor's bytes or numbers, and the relative error of what they hold."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    heads = interleaved_heads(spec, name, architecture)
    order = pairs(spec.tensors()[name][0], heads) if heads else None
    matrix = tensors.codes(name) if kind in gguf_codes.KINDS else None
    if matrix is not None and gguf_codes.KINDS[kind] == matrix.bits:
        return gguf_codes.to_blocks(matrix if order is None else matrix.rows(order)), 0.0
    values = tensors.read(name).float()
    values = values if order is None else values[order]
    if kind == "F32":
        return values.numpy(), 0.0
    if kind in gguf_codes.KINDS:
        rounded = nearest(values, gguf_codes.KINDS[kind], gguf_codes.SIZE)
        return gguf_codes.to_blocks(rounded), _error(values, rounded.dequantise())
    if kind == "F16":
        return (half := values.half()).numpy(), _error(values, half.float())
    wanted = GGMLQuantizationType[kind]
    data = quantize(values.numpy(), wanted)
    return data.view(np.uint8), _error(values, torch.from_numpy(dequantize(data, wanted)))


def _error(values: Tensor, held: Tensor) -> float:
    norm = float(values.double().norm())
    return float((values.double() - held.double()).norm()) / norm if norm else 0.0


def _write_vocabulary(writer: Any, source: Source) -> None:
    from gguf import GGUFValueType

    for key, value, kind in gguf_vocab.entries(source):
        name, _, inner = kind.partition(":")
        sub = GGUFValueType[inner] if inner else None
        writer.add_key_value(key, value, GGUFValueType[name], sub)


def _write_spec(writer: Any, spec: ModelSpec, architecture: str) -> None:
    writer.add_name(Path(spec.source).parent.name or architecture)
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_vocab_size(spec.vocab)
    if spec.window is not None:
        writer.add_sliding_window(spec.window)
    if architecture == "minicpm":
        writer.add_embedding_scale(spec.embed_scale)
        writer.add_residual_scale(spec.residual_scale)
        writer.add_logit_scale(1.0 / spec.logit_scale)  # a divisor there
    _write_rope(writer, spec.rope)


def _write_rope(writer: Any, rope: Rope) -> None:
    from gguf import RopeScalingType

    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)


def _factors(spec: ModelSpec) -> Iterator[tuple[str, np.ndarray]]:
    """Divisors of the rotary frequencies, as tensors."""
    rope, half = spec.rope, spec.head_dim
    if rope.kind == "llama3":
        plain = Rope(theta=rope.theta).frequencies(half)
        yield "rope_freqs.weight", (plain / rope.frequencies(half)).astype(np.float32)
    if rope.kind == "longrope":
        for name in ("long", "short"):
            values = np.array(getattr(rope, f"{name}_factor"), np.float32)
            yield f"rope_factors_{name}.weight", values
