"""The model against Llama where its scalings are neutral, and against plain torch where not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, StaticCache

from minicpm4 import MiniCPM4ForCausalLM
from minicpm4.presets import tiny

NEUTRAL = {"scale_emb": 1, "scale_depth": math.sqrt(2), "dim_model_base": 96}


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def llama_of(model: MiniCPM4ForCausalLM) -> LlamaForCausalLM:
    c = model.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    same += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    twin = LlamaForCausalLM(LlamaConfig(**{name: getattr(c, name) for name in same})).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 24},
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10},
    ],
)
def test_neutral_scalings_make_a_llama(shape: dict[str, Any]) -> None:
    model = tiny(**NEUTRAL, **shape)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm applied twice or in the wrong place
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    twin = llama_of(model)
    ids = tokens(3, 17)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(ids, labels=ids).loss, twin(ids, labels=ids).loss)
    # Left padding: position ids and mask come out as Llama's do.
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, :4] = 0, 0
    ids[mask == 0] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 255}
    ours = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours, twin.generate(ids, attention_mask=mask, **options))
    alone = model.generate(ids[:1, 9:], **options)
    assert torch.equal(ours[0, 9 : 9 + alone.shape[1]], alone[0])


def plain_logits(model: MiniCPM4ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """MiniCPM's equations (arXiv 2404.06395 table 2) over one sequence, in float64."""
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    half = c.head_dim // 2
    angle = torch.arange(len(ids))[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
    spin = torch.polar(torch.ones_like(angle), angle)

    def rope(x: torch.Tensor) -> torch.Tensor:
        y = torch.complex(x[..., :half], x[..., half:]) * spin
        return torch.cat((y.real, y.imag), -1)

    x = w["model.embed_tokens.weight"][ids] * c.scale_emb
    for layer in range(c.num_hidden_layers):
        p = {k.split(f"layers.{layer}.")[1]: v for k, v in w.items() if f"layers.{layer}." in k}
        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (
            (h @ p[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, c.head_dim)).transpose(0, 1)
            for n in "qkv"
        )
        k, v = (t.repeat_interleave(c.num_attention_heads // len(t), 0) for t in (k, v))
        scores = rope(q) @ rope(k).mT / math.sqrt(c.head_dim)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        h = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ p["self_attn.o_proj.weight"].T
        x = x + h * c.scale_depth / math.sqrt(c.num_hidden_layers)
        h = norm(x, p["post_attention_layernorm.weight"])
        h = F.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)
        x = x + h @ p["mlp.down_proj.weight"].T * c.scale_depth / math.sqrt(c.num_hidden_layers)
    x = norm(x, w["model.norm.weight"]) / (c.hidden_size / c.dim_model_base)
    return x @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scalings_are_the_papers(attention: str) -> None:
    model = tiny(num_hidden_layers=3, scale_emb=12, scale_depth=1.4, attn_implementation=attention)
    ids = tokens(1, 23)
    assert model.config.width_ratio == 2
    got = model(ids).logits[0].double()
    torch.testing.assert_close(got, plain_logits(model, ids[0]), atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 19, (7, 1, 11), (18, 1)])
def test_any_chunking_through_a_cache_is_the_whole_pass(chunks: tuple[int, ...]) -> None:
    model, ids = tiny(), tokens(2, 19)
    whole, cache, parts = model(ids).logits, None, []
    for part in ids.split(chunks, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    static = StaticCache(config=model.config, max_cache_len=32)
    parts = [model(part, past_key_values=static).logits for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_attention_registered_by_name_runs_and_sees_the_module() -> None:
    seen: list[tuple[int, ...]] = []

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((module.layer_idx, query.shape[1], key.shape[1], key.shape[2]))
        assert kwargs["scaling"] == module.head_dim**-0.5
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("minicpm4_spy", spy)
    model, ids = tiny(), tokens(1, 9)
    expected = model(ids).logits
    model.set_attn_implementation("minicpm4_spy")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    assert seen == [(0, 6, 2, 9), (1, 6, 2, 9)]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids = tokens(2, 11)
    plain, saving = tiny().train(), tiny().train()
    saving.activation_checkpointing_enable()
    for model in (plain, saving):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@torch.no_grad()
def test_outputs_asked_for() -> None:
    model, ids = tiny(attn_implementation="eager"), tokens(2, 9)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 96)] * 3
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 9))
        assert not weights.triu(1).any()
    for keep, rows in ((1, slice(-1, None)), (4, slice(-4, None)), (torch.tensor([2, 5]), [2, 5])):
        got = model(ids, logits_to_keep=keep).logits
        torch.testing.assert_close(got, out.logits[:, rows], atol=1e-5, rtol=0)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, out.logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    for arguments in ({"output_attentions": True}, {}):
        assert isinstance(model(ids, return_dict=False, **arguments), tuple)


def test_loss_is_the_mean_over_labelled_positions() -> None:
    model, ids = tiny(), tokens(2, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    log_p = model(ids).logits.log_softmax(-1)
    wanted = [-log_p[b, t - 1, ids[b, t]] for b in (0, 1) for t in range(5 if b == 0 else 1, 9)]
    torch.testing.assert_close(model(ids, labels=labels).loss, torch.stack(wanted).mean())


def test_initialisation_follows_the_width() -> None:
    """MiniCPM table 2: hidden matrices shrink with √(width ratio), embedding and head do not."""
    for width, ratio in ((128, 1.0), (512, 4.0)):
        model = tiny(
            hidden_size=width,
            num_attention_heads=8,
            dim_model_base=128,
            intermediate_size=256,
            tie_word_embeddings=False,
        )
        for name, p in model.named_parameters():
            if "norm" in name:
                assert (p == 1).all()
                continue
            hidden = ".layers." in name
            wanted = 0.1 / math.sqrt(ratio) if hidden else 0.1
            assert p.std().item() == pytest.approx(wanted, rel=0.03), name


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_llama_is() -> None:
    ids = tokens(2, 64)
    model = tiny(**NEUTRAL)
    truth, twin = model(ids).logits, llama_of(model)
    ours = (model.bfloat16()(ids).logits.float() - truth).norm()
    theirs = (twin.bfloat16()(ids).logits.float() - truth).norm()
    assert ours < 1.5 * theirs
