"""What people do with a transformers model: train, compile, save, wrap, guess ahead."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infllm2 import InfLLMv2Config, register, sparse

testbed = pytest.importorskip("testbed")
transformers = pytest.importorskip("transformers")

from infllm2.cache import SparseCache  # noqa: E402 - needs transformers

ARCHS = ("llama-gqa3", "qwen2", "qwen3", "mistral", "phi3", "minicpm4")


def tiny(arch: str = "llama-gqa3", **overrides: object) -> transformers.PreTrainedModel:
    if arch == "minicpm4":  # it comes with the package of that name
        pytest.importorskip("minicpm4")
    return testbed.tiny(arch, **overrides)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def step(model: transformers.PreTrainedModel, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of one step."""
    model.zero_grad()
    model(prompt, labels=prompt, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(small: InfLLMv2Config, reentrant: bool) -> None:
    model, prompt = tiny().train(), ids(2, 150)
    with sparse(model, small):
        expected = step(model, prompt)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = step(model, prompt)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_mixed_precision_training(arch: str, backend: str, small: InfLLMv2Config) -> None:
    model, prompt = tiny(arch).train(), ids(2, 150)
    with sparse(model, small, backend=backend):
        expected = step(model, prompt)
        with torch.autocast("cpu", torch.bfloat16):
            got = step(model, prompt)
    ours, truth = (torch.cat([x.flatten() for x in grads]) for grads in (got, expected))
    assert torch.nn.functional.cosine_similarity(ours, truth, 0) > 0.98


def test_dropout_elsewhere_than_in_attention(small: InfLLMv2Config) -> None:
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=32, n_layer=1, n_head=2, n_positions=256, attn_pdrop=0.0,
        resid_pdrop=0.2, embd_pdrop=0.2,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    with sparse(model, small) as trace:
        assert all(g.isfinite().all() for g in step(model, ids(2, 150)))
    assert trace.visited_share < 1


def test_a_cache_does_not_train_in_silence(small: InfLLMv2Config) -> None:
    model, prompt = tiny(), ids(1, 120)
    with sparse(model, small):
        loss = model(prompt, labels=prompt, past_key_values=SparseCache(small)).loss
        with pytest.raises(RuntimeError, match="train without one"):
            loss.backward()


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_models(small: InfLLMv2Config, compiler: None) -> None:
    """The switch is seen by code compiled before it, and back."""
    model, prompt = tiny("llama-gqa3", num_hidden_layers=1), ids(2, 150)
    compiled = torch.compile(model, backend="eager")
    dense = model(prompt).logits
    torch.testing.assert_close(compiled(prompt).logits, dense, rtol=1e-4, atol=1e-4)
    with sparse(compiled, small) as trace:
        wanted = model(prompt).logits
        got = compiled(prompt).logits
    assert len(trace.calls) == 2 * model.config.num_hidden_layers
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - dense).abs().max() > 1e-3
    torch.testing.assert_close(compiled(prompt).logits, dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_modules_around_a_model(small: InfLLMv2Config) -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = tiny()
    with sparse(Adapter(model), small) as trace:
        model(ids(1, 100))
    assert trace.visited_share < 1 and model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_saved_models_come_back(tmp_path: Path, small: InfLLMv2Config) -> None:
    register()
    model, prompt = tiny(), ids(1, 150)
    with sparse(model, small):
        wanted = model(prompt).logits
        model.save_pretrained(tmp_path / "inside")
    # Being sparse for a while leaves no trace in what is saved.
    assert "infllm2" not in (tmp_path / "inside" / "config.json").read_text()
    model.config.sparse_config = dataclasses.asdict(small)
    model.set_attn_implementation("infllm2")
    model.save_pretrained(tmp_path / "sparse")
    entry = json.loads((tmp_path / "sparse" / "config.json").read_text())["sparse_config"]
    assert InfLLMv2Config.from_pretrained_config(entry) == small
    auto = transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "sparse", attn_implementation="infllm2")
    assert torch.equal(again(prompt).logits, wanted)
    fresh = auto.from_config(again.config, attn_implementation="infllm2").eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(prompt).logits, wanted)
    dense = auto.from_pretrained(tmp_path / "sparse")(prompt).logits
    assert (dense - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_minicpm4_carries_its_own_sizes(small: InfLLMv2Config) -> None:
    register()
    entry = {k: v for k, v in dataclasses.asdict(small).items() if k not in ("lse", "compat")}
    model, prompt = tiny("minicpm4", sparse_config=entry), ids(2, 150)
    assert InfLLMv2Config.from_pretrained_config(model.config) == small
    with sparse(model, small):
        wanted = model(prompt).logits
    model.set_attn_implementation("infllm2")
    assert torch.equal(model(prompt).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype, small: InfLLMv2Config) -> None:
    model, prompt = tiny().to(dtype), ids(2, 150)
    with sparse(model, small):
        own = model.generate(prompt, max_new_tokens=6, do_sample=False)
        cached = model.generate(
            prompt, max_new_tokens=6, do_sample=False, past_key_values=SparseCache(small)
        )
    assert torch.equal(own, cached)


@torch.no_grad()
@pytest.mark.parametrize("ours", [False, True])
def test_an_assistant_model_changes_nothing(small: InfLLMv2Config, ours: bool) -> None:
    """A good assistant, a bad one: some guesses stand, most are taken back."""
    model, prompt = tiny(), ids(1, 150)
    near = tiny()
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.02 * torch.randn_like(p))
    options = {"max_new_tokens": 24, "do_sample": False}
    with sparse(model, small), sparse(near, small):
        plain = model.generate(prompt, **options)
        for assistant in (near, tiny("llama-gqa3", seed=7)):
            cache = {"past_key_values": SparseCache(small)} if ours else {}
            got = model.generate(prompt, assistant_model=assistant, **cache, **options)
            assert torch.equal(got, plain)


@torch.no_grad()
def test_kept_blocks_are_the_first_row_s(small: InfLLMv2Config) -> None:
    """Rows of other lengths are computed apart, and may come later."""
    model, batch = tiny(), ids(3, 150)
    mask = torch.ones_like(batch)
    mask[1, :53] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with sparse(model, small, keep_blocks=True) as alone:
        model(batch[:1])
    for chunk in (150, 60):
        cache = transformers.DynamicCache()
        with sparse(model, small, keep_blocks=True) as trace:
            for at in range(0, 150, chunk):
                part = slice(at, at + chunk)
                model(
                    batch[:, part], attention_mask=mask[:, : at + chunk],
                    position_ids=places[:, part], past_key_values=cache,
                )  # fmt: skip
        for layer in range(2):
            assert torch.equal(trace.blocks(layer), alone.blocks(layer))


@torch.no_grad()
def test_a_row_of_padding_alone(small: InfLLMv2Config) -> None:
    model, batch = tiny(), ids(2, 100)
    mask = torch.ones_like(batch)
    mask[1] = 0
    with sparse(model, small):
        logits = model(batch, attention_mask=mask).logits
        torch.testing.assert_close(logits[:1], model(batch[:1]).logits, rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all()


def test_what_is_not_causal_is_refused(small: InfLLMv2Config) -> None:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    encoder = transformers.BertModel(config)
    with pytest.raises(ValueError, match="encoders"), sparse(encoder, small):
        encoder(ids(1, 100))
    model = tiny()
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="LlamaAttention is not: encoders"), sparse(model, small):
        model(ids(1, 100))
    right = torch.ones(1, 100, dtype=torch.long)
    right[0, 90:] = 0
    model = tiny()
    with pytest.raises(ValueError, match="attention_mask has holes"), sparse(model, small):
        model.generate(ids(1, 100), attention_mask=right, max_new_tokens=2)
