from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from infllm2 import InfLLMv2Config, register, select_blocks, sparse, traced_dense

testbed = pytest.importorskip("testbed")
transformers = pytest.importorskip("transformers")

ARCHS = ("llama", "llama-gqa3", "qwen2", "qwen3", "mistral", "phi3", "minicpm4")
COVERS = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=20, dense_len=-1
)


def tiny(arch: str, **overrides: object) -> transformers.PreTrainedModel:
    try:
        return testbed.tiny(arch, **overrides)
    except ValueError as error:
        # MiniCPM4 comes with the package of that name, which need not be installed.
        if arch != "minicpm4" or "arch must be one of" not in str(error):
            raise
        pytest.skip("package minicpm4 is not installed")


@pytest.fixture(scope="module")
def llama() -> Iterator[transformers.PreTrainedModel]:
    yield tiny("llama-gqa3")


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_equals_dense_when_the_budget_covers_the_prompt(arch: str, small: InfLLMv2Config) -> None:
    model, prompt = tiny(arch), ids(2, 200)
    before = model.config._attn_implementation
    dense = model(prompt).logits
    with sparse(model, COVERS) as trace:
        got = model(prompt).logits
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before
    assert torch.equal(model(prompt).logits, dense)
    assert trace.visited_share == 1.0
    with sparse(model, small) as trace:
        other = model(prompt).logits
    assert trace.visited_share < 1
    # Up to the budget (five blocks of 16) nothing is left out; after it something is.
    torch.testing.assert_close(other[:, :80], dense[:, :80], rtol=1e-4, atol=1e-4)
    assert (other[:, 80:] - dense[:, 80:]).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ARCHS)
def test_generate_with_a_covering_budget_equals_dense(arch: str) -> None:
    model, prompt = tiny(arch), ids(2, 60)
    options = {"max_new_tokens": 12, "do_sample": False}
    mask = torch.ones_like(prompt)
    dense = model.generate(prompt, attention_mask=mask, **options)
    with sparse(model, COVERS) as trace:
        got = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(got, dense)
    layers = model.config.num_hidden_layers
    assert len(trace.calls) == 12 * layers
    assert sum(call.prefill for call in trace.calls) == layers
    assert [c.keys for c in trace.calls if c.layer == 0] == list(range(60, 72))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_restores_after_an_exception_and_when_nested(
    llama: transformers.PreTrainedModel, small: InfLLMv2Config, implementation: str
) -> None:
    model = llama
    model.set_attn_implementation(implementation)
    with pytest.raises(RuntimeError, match="boom"), sparse(model, small):
        assert model.config._attn_implementation == "infllm2"
        raise RuntimeError("boom")
    assert model.config._attn_implementation == implementation
    prompt = ids(1, 100)
    with torch.no_grad(), sparse(model, COVERS) as outer:
        with traced_dense(model) as inner:
            model(prompt)
        with sparse(model, small) as innermost:
            model(prompt)
        model(prompt)
    assert [len(t.calls) for t in (outer, inner, innermost)] == [2, 2, 2]
    assert model.config._attn_implementation == implementation
    from infllm2.hf_attention import sessions

    assert not sessions
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(
    llama: transformers.PreTrainedModel, small: InfLLMv2Config, side: str
) -> None:
    prompts = [ids(1, n, seed=n) for n in (150, 97, 150, 3)]
    batch = torch.zeros(4, 150, dtype=torch.long)
    mask = torch.zeros_like(batch)
    places = []
    for row, prompt in enumerate(prompts):
        n = prompt.shape[1]
        at = slice(150 - n, 150) if side == "left" else slice(0, n)
        batch[row, at], mask[row, at] = prompt[0], 1
        places.append(at)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with sparse(llama, small) as together:
        logits = llama(batch, attention_mask=mask, position_ids=positions).logits
    with sparse(llama, small) as alone:
        for row, prompt in enumerate(prompts):
            single = llama(prompt).logits[0]
            torch.testing.assert_close(logits[row, places[row]], single, rtol=1e-4, atol=1e-4)
    a, b = together.summary(), alone.summary()
    for name in ("queries", "visited_blocks", "causal_blocks"):
        assert a[name] == b[name]


def test_left_padded_generate_equals_rows_alone(
    llama: transformers.PreTrainedModel, small: InfLLMv2Config
) -> None:
    long, short = ids(1, 140), ids(1, 95, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 45, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :45] = 0
    options = {"max_new_tokens": 8, "do_sample": False}
    with sparse(llama, small):
        together = llama.generate(batch, attention_mask=mask, **options)
        for row, prompt in enumerate((long, short)):
            single = llama.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert torch.equal(together[row, 140:], single[0, prompt.shape[1] :])


@pytest.mark.parametrize("chunk", [1, 17, 64])
@torch.no_grad()
def test_prefill_in_chunks_equals_prefill_at_once(
    llama: transformers.PreTrainedModel, small: InfLLMv2Config, chunk: int
) -> None:
    prompt = ids(1, 150)
    with sparse(llama, small, keep_blocks=True) as trace:
        whole = llama(prompt).logits
        blocks = trace.blocks(1)
        cache, parts = transformers.DynamicCache(), []
        for at in range(0, 150, chunk):
            out = llama(prompt[:, at : at + chunk], past_key_values=cache)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        # Chunks of one token are decoding steps, which are not kept.
        assert torch.equal(trace.blocks(1), blocks)


def test_static_cache_with_room_for_later(
    llama: transformers.PreTrainedModel, small: InfLLMv2Config
) -> None:
    prompt = ids(1, 120)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with sparse(llama, small):
        dynamic = llama.generate(prompt, **options)
        static = llama.generate(
            prompt, cache_implementation="static", disable_compile=True, **options
        )
    assert torch.equal(dynamic, static)


def test_gradients_reach_every_layer(llama: transformers.PreTrainedModel) -> None:
    prompt = ids(2, 120)
    found = []
    for context in (traced_dense(llama), sparse(llama, COVERS)):
        llama.zero_grad()
        with context:
            llama(prompt, labels=prompt).loss.backward()
        found.append([p.grad.clone() for p in llama.parameters()])
    for dense, got in zip(*found, strict=True):
        torch.testing.assert_close(got, dense, rtol=1e-3, atol=1e-5)


def test_training_under_autocast(llama: transformers.PreTrainedModel) -> None:
    """Rotary embedding leaves q and k in float32 there, and v in bfloat16."""
    prompt = ids(2, 120)
    found = []
    for context in (traced_dense(llama), sparse(llama, COVERS)):
        llama.zero_grad()
        with context, torch.autocast("cpu", torch.bfloat16):
            loss = llama(prompt, labels=prompt, use_cache=False).loss
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in llama.parameters()]))
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


@torch.no_grad()
def test_trace_counts_what_the_configuration_implies(small: InfLLMv2Config) -> None:
    model, prompt = tiny("llama-gqa3"), ids(2, 150)
    with sparse(model, small) as trace:
        model(prompt)
    own = [t // 16 for t in range(150)]
    visited = sum(min(m + 1, 5) for m in own) * 2 * 2
    causal = sum(m + 1 for m in own) * 2 * 2
    rows = trace.by_layer()
    assert sorted(rows) == [0, 1]
    assert all(r["visited_blocks"] == visited for r in rows.values())
    assert all(r["causal_blocks"] == causal for r in rows.values())
    summary = trace.summary()
    assert summary["visited_share"] == pytest.approx(visited / causal)
    assert summary["queries"] == 300 and summary["calls"] == 2
    assert 0 < summary["prefill_seconds"] == summary["attention_seconds"]
    with traced_dense(model, block_size=16) as dense:
        model(prompt)
    assert dense.summary()["visited_blocks"] == causal * 2
    assert dense.visited_share == 1 and dense.seconds > 0
    with sparse(model, replace(small, dense_len=1000)) as switched:
        model(prompt)
    assert switched.summary()["visited_blocks"] == causal * 2


@torch.no_grad()
def test_blocks_chosen_another_way(
    llama: transformers.PreTrainedModel, small: InfLLMv2Config
) -> None:
    """`select` takes the place of the scores, for padded rows and decoding steps too."""
    prompt, mask, asked = ids(2, 150), torch.ones(2, 150, dtype=torch.long), []
    mask[1, :40] = 0

    def worst(q: torch.Tensor, k: torch.Tensor, config: InfLLMv2Config) -> torch.Tensor:
        asked.append((q.shape[2], k.shape[2]))
        return select_blocks(-q, k, config)

    for given in (None, mask):
        found = []
        for select in (None, select_blocks, worst):
            with sparse(llama, small, select=select):
                found.append(llama(prompt, attention_mask=given).logits[0])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        assert (found[2] - found[0])[80:].abs().max() > 1e-3
    with sparse(llama, small, select=worst):
        llama.generate(prompt[:1], max_new_tokens=2)
    padded = [(150, 150), (110, 110)] * 2
    assert asked == [(150, 150)] * 2 + padded + [(150, 150)] * 2 + [(1, 151)] * 2
    with sparse(llama, small, select=lambda *args: worst(*args).flip(-1)):
        with pytest.raises(ValueError, match="blocks must ascend"):
            llama(prompt)


@torch.no_grad()
def test_blocks_that_were_not_kept(
    llama: transformers.PreTrainedModel, small: InfLLMv2Config
) -> None:
    with sparse(llama, small) as trace:
        llama(ids(1, 100))
    with pytest.raises(ValueError, match="keep_blocks=True"):
        trace.blocks(0)
    with sparse(llama, replace(small, dense_len=1000), keep_blocks=True) as trace:
        llama(ids(1, 100))
    with pytest.raises(ValueError, match="layer 0 had no sparse prefill"):
        trace.blocks(0)


@torch.no_grad()
def test_registered_implementation_reads_the_model_s_own_sizes(small: InfLLMv2Config) -> None:
    register()
    model, prompt = tiny("llama-gqa3"), ids(1, 150)
    dense = model(prompt).logits
    with sparse(model, small):
        wanted = model(prompt).logits
    model.set_attn_implementation("infllm2")
    # Without an entry the trained sizes hold, and 150 tokens are far below their dense_len.
    torch.testing.assert_close(model(prompt).logits, dense, rtol=1e-4, atol=1e-4)
    model.config.sparse_config = {
        "kernel_size": 8,
        "kernel_stride": 4,
        "block_size": 16,
        "window_size": 32,
        "topk": 3,
        "dense_len": -1,
    }
    torch.testing.assert_close(model(prompt).logits, wanted)


@torch.no_grad()
def test_scaling_of_the_model_is_kept(small: InfLLMv2Config) -> None:
    """Models with a logit scale of their own: selection and attention both follow it."""
    model, prompt = tiny("llama"), ids(1, 150)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.7
    dense = model(prompt).logits
    with sparse(model, COVERS):
        torch.testing.assert_close(model(prompt).logits, dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_not_supported_is_refused(small: InfLLMv2Config) -> None:
    prompt = ids(1, 100)
    window = tiny("mistral", sliding_window=50)
    with pytest.raises(ValueError, match="sliding-window"), sparse(window, small):
        window(prompt)
    dropout = tiny("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="no dropout, got 0.1"), sparse(dropout, small):
        dropout(prompt)
    model = tiny("llama")
    holes = torch.ones_like(prompt)
    holes[0, 40] = 0
    with pytest.raises(ValueError, match="attention_mask has holes"), sparse(model, small):
        model(prompt, attention_mask=holes)
    packed = torch.cat([torch.arange(50), torch.arange(50)])[None]
    with pytest.raises(ValueError, match="packed sequences"), sparse(model, small):
        model(prompt, position_ids=packed, use_cache=False)
    four = torch.zeros(1, 1, 100, 100)
    with pytest.raises(ValueError, match="pass the 2D attention_mask"), sparse(model, small):
        model(prompt, attention_mask=four)
    with pytest.raises(ValueError, match="config must be an InfLLMv2Config"):
        sparse(model, {}).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be a transformers PreTrainedModel"):
        sparse(torch.nn.Linear(1, 1), small).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        sparse(model, small, backend="cuda").__enter__()
