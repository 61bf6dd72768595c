"""Run any transformers decoder with InfLLM v2, and measure its attention.

Works through transformers' attention and mask interfaces, so no model code is patched. Needs the
`hf` extra (transformers ≥ 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from infllm2 import backends
from infllm2.attention import Select
from infllm2.config import InfLLMv2Config
from infllm2.hf_attention import (
    Session,
    dense_forward,
    padding_mask,
    sessions,
    sparse_forward,
)
from infllm2.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "infllm2"
DENSE_IMPLEMENTATION = "infllm2_traced_dense"


def register() -> None:
    """Make `attn_implementation="infllm2"` known to transformers; may be called again.

    A model loaded that way reads its sizes from `config.sparse_config`, or takes the defaults of
    `InfLLMv2Config` where there is none.

    Raises:
        ImportError: transformers is missing.
    """
    transformers = _transformers()
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register(IMPLEMENTATION, sparse_forward)
    transformers.AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
    transformers.AttentionInterface.register(DENSE_IMPLEMENTATION, dense_forward)
    transformers.AttentionMaskInterface.register(DENSE_IMPLEMENTATION, sdpa_mask)


@contextmanager
def sparse(
    model: PreTrainedModel,
    config: InfLLMv2Config,
    *,
    backend: str = "auto",
    keep_blocks: bool = False,
    select: Select | None = None,
) -> Iterator[Trace]:
    """Run a transformers decoder with InfLLM v2 inside the `with` block, and as before after it.

    Works in plain forward passes, `generate`, prefill in chunks (over `past_key_values`) and padded
    batches: each row is attended to without its padding, so it gives what it would give alone.
    Outputs at padding positions are 0. With `past_key_values=SparseCache(config)` a decoding step
    compresses only what is new; with any other cache all keys are compressed again. A compiled
    model runs the attention between its graphs. With gradient checkpointing, which computes
    attention again in `backward`, call `backward` inside the block too.

    Args:
        model: any decoder that uses transformers' attention interface (Llama, Qwen2, Qwen3,
            Mistral, Phi-3, MiniCPM4 …), without sliding-window layers; or a module around it, such
            as `torch.compile` or an adapter makes.
        config: sizes and budget. Sequences shorter than `config.dense_len` run dense.
        backend: see `select_blocks`.
        keep_blocks: keep the visited blocks of each layer's last prefill for `Trace.blocks`.
        select: another way to choose, `(q, k, config) -> blocks` with the shapes of
            `select_blocks`; called for each layer, pass and group of equally padded rows.

    Yields:
        A `Trace` of every attention call.

    Raises:
        ValueError: the model cannot change its attention, or asks attention for what InfLLM v2 is
            not (sliding windows, soft-capped logits, dropout, packed sequences, masks with holes).
        ImportError: transformers is missing.
    """
    if not isinstance(config, InfLLMv2Config):
        raise ValueError(f"config must be an InfLLMv2Config, got {type(config).__name__}")
    if backend != "auto":
        backends.get(backend)
    if config.use_nope:
        raise ValueError(
            "use_nope=True needs queries and keys before rotary embedding, which transformers does "
            "not hand to attention: call infllmv2_attention(..., unrotated=(q, k))"
        )
    trace = Trace(config.block_size, keep_blocks)
    with _switched(model, IMPLEMENTATION, trace, config, backend, select):
        yield trace


@contextmanager
def traced_dense(model: PreTrainedModel, *, block_size: int = 64) -> Iterator[Trace]:
    """Run a decoder with PyTorch's fused dense attention, timed and counted the way `sparse` is.

    Args:
        model: as for `sparse`.
        block_size: unit of the block counts; every causal block counts as visited, padding
            included, for that is what dense attention computes.

    Yields:
        A `Trace` of every attention call.

    Raises:
        ValueError: the model cannot change its attention.
        ImportError: transformers is missing.
    """
    with _switched(model, DENSE_IMPLEMENTATION, Trace(block_size), None, "auto") as trace:
        yield trace


@contextmanager
def _switched(
    model: PreTrainedModel,
    implementation: str,
    trace: Trace,
    config: InfLLMv2Config | None,
    backend: str,
    select: Select | None = None,
) -> Iterator[Trace]:
    """Change the attention of all decoders inside `model`, and change it back whatever happens."""
    register()
    configs = _model_configs(model)
    before = [(c, c._attn_implementation, sessions.get(id(c))) for c in configs]
    try:
        for model_config in configs:
            model_config._attn_implementation_internal = implementation
            sessions[id(model_config)] = Session(model_config, trace, config, backend, select)
        yield trace
    finally:
        for model_config, old, session in before:
            model_config._attn_implementation_internal = old
            if session is None:
                sessions.pop(id(model_config), None)
            else:
                sessions[id(model_config)] = session


def _model_configs(model: PreTrainedModel) -> list[Any]:
    """Distinct configuration objects of the model and the models inside it."""
    transformers = _transformers()
    modules = model.modules() if hasattr(model, "modules") else ()
    inner = [m for m in modules if isinstance(m, transformers.PreTrainedModel)]
    if not inner:
        raise ValueError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    if not inner[0]._can_set_attn_implementation():
        raise ValueError(
            f"{type(inner[0]).__name__} does not use transformers' attention interface, so its "
            "attention cannot be exchanged: call infllmv2_attention from its own code"
        )
    return list({id(m.config): m.config for m in inner}.values())


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "infllm2.hf needs transformers: pip install 'minicpm4-infllm2[hf]'"
        ) from error
    return transformers
