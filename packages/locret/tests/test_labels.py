from __future__ import annotations

import math

import pytest
import torch

testbed = pytest.importorskip("testbed")
transformers = pytest.importorskip("transformers")

from locret.interface import exchanged  # noqa: E402
from locret.labels import (  # noqa: E402
    FLOOR,
    blocked_attention,
    blocked_importance,
    collect,
    overlap,
)


def brute_force(model, ids: torch.Tensor, answer: int, layer: int) -> torch.Tensor:
    """Labels [J, n] from the definition: projections and rotation of transformers' own module."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden = model(ids, output_hidden_states=True).hidden_states[layer]
    block = model.model.layers[layer]
    x, attention = block.input_layernorm(hidden), block.self_attn
    shape = (1, ids.shape[1], -1, attention.head_dim)
    q, k = (p(x).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    cos, sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    n, groups = ids.shape[1] - answer, q.shape[1] // k.shape[1]
    found = torch.empty(k.shape[1], n)
    for j in range(k.shape[1]):
        for t in range(n):
            found[j, t] = max(
                float(q[0, h, p] @ k[0, j, t]) / math.sqrt(attention.head_dim)
                for h in range(j * groups, (j + 1) * groups)
                for p in range(n, ids.shape[1])
            )
    return found


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama-gqa3", "llama-mqa"])
def test_labels_are_the_definition(arch: str) -> None:
    model = testbed.tiny(arch)
    ids = torch.randint(5, 250, (1, 23))
    for layer, x, labels in gathered(model, ids, 4, "hidden"):
        expected = brute_force(model, ids, 4, layer)
        assert (labels[0] - expected).abs().max() < 1e-5
        assert x.shape == (1, 19, model.config.hidden_size)


def gathered(model, ids: torch.Tensor, answer: int, input: str, **more) -> list:
    found: list = []
    collect(model, ids, answer, lambda *parts: found.append(parts), input=input, rows=3, **more)
    return found


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama-gqa3", "llama-mqa"])
@pytest.mark.parametrize("query", [0, 5])
def test_attention_labels_are_the_weights_that_transformers_shows(arch: str, query: int) -> None:
    model = testbed.tiny(arch)
    for parameter in model.parameters():  # weights that differ from one another
        parameter.mul_(2)
    ids = torch.randint(5, 250, (2, 23))
    found = gathered(model, ids, 7, "hidden", labels="attention", query=query)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    for layer, x, labels in found:
        kv_heads = model.config.num_key_value_heads
        best = weights[layer].unflatten(1, (kv_heads, -1))[..., 16:, query:16].amax((2, 3))
        assert labels.shape == best.shape and x.shape[1] == 16 - query
        assert (labels - best.log().clamp(min=FLOOR)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("arch", testbed.tiny_archs())
def test_qkv_is_what_the_projections_gave(arch: str) -> None:
    """The head's input is found again from what RoPE made of it."""
    model = testbed.tiny(arch)
    ids = torch.randint(5, 250, (2, 17))
    before = model(ids).logits
    seen: dict = {}

    def attend(call):
        seen[call.layer] = call.unrotated()
        return torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, scale=call.scaling, enable_gqa=True
        )

    with exchanged(model, attend):
        assert (model(ids, use_cache=False).logits - before).abs().max() < 1e-4
    assert torch.equal(model(ids).logits, before)  # all is undone
    hooked: dict = {}
    attention = model.model.layers[1].self_attn
    if not hasattr(attention, "q_proj"):  # Phi-3: one matrix for all
        width = [model.config.num_attention_heads, 2 * model.config.num_key_value_heads]
        head_dim = attention.head_dim

        def keep(module, args, out):
            hooked["q"] = out[..., : width[0] * head_dim]

        handle = attention.qkv_proj.register_forward_hook(keep)
    elif hasattr(attention, "q_norm"):  # Qwen3: normed between projection and RoPE

        def keep(module, args, out):
            hooked["q"] = out.flatten(2)

        handle = attention.q_norm.register_forward_hook(keep)
    else:

        def keep(module, args, out):
            hooked["q"] = out

        handle = attention.q_proj.register_forward_hook(keep)
    model(ids)
    handle.remove()
    assert (seen[1][0].transpose(1, 2).flatten(2) - hooked["q"]).abs().max() < 1e-4
    width = gathered(model, ids, 3, "qkv")[1][1].shape[-1]
    config = model.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    assert width == heads * attention.head_dim


def test_blocks_of_rows_do_not_change_the_labels() -> None:
    q, k = torch.randn(2, 6, 11, 8), torch.randn(2, 2, 7, 8)
    from locret import importance

    for rows in (1, 4, 11, 100):
        found = blocked_importance(q, k, 8**-0.5, rows)
        assert (found - importance(q, k)).abs().max() < 1e-5


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_attention_in_blocks_is_the_definition(heads: tuple[int, int]) -> None:
    from locret import attention_importance

    q, k = torch.randn(2, heads[0], 11, 8), torch.randn(2, heads[1], 18, 8)
    expected = attention_importance(q, k)
    for rows in (1, 4, 11, 100):
        assert (blocked_attention(q, k, 7, 8**-0.5, rows) - expected).abs().max() < 1e-5
    k[:, :, 0] = -1e3 * q[0, 0, 0]  # nobody looks there, by hundreds of nats
    far = blocked_attention(q[:1, :1, :1], k[:1, :1], 17, 8**-0.5)
    assert far.isfinite().all() and far[0, 0, 0] == FLOOR == far.min() and far.max() <= 0


def test_an_unknown_kind_of_label_is_refused() -> None:
    from locret.training import TrainConfig

    with pytest.raises(ValueError, match="must be one of scores, attention"):
        TrainConfig(labels="softmax")
    with pytest.raises(ValueError, match="must be one of scores, attention"):
        gathered(testbed.tiny("llama"), torch.ones(1, 5, dtype=torch.long), 2, "hidden", labels="")


def test_a_text_needs_a_prompt_and_an_answer() -> None:
    model = testbed.tiny("llama")
    for answer in (0, 5):
        with pytest.raises(ValueError, match="both need at least one token"):
            collect(model, torch.ones(1, 5, dtype=torch.long), answer, lambda *_: None)


def test_overlap_counts_the_shared_best() -> None:
    labels = torch.arange(20.0)[None, None]
    assert overlap(labels, labels) == 1
    assert overlap(-labels, labels) == 0
    half = labels.clone()
    half[..., 19] = -1
    assert overlap(half, labels) == 0.5
