from __future__ import annotations

import pytest
import torch

import testbed

BUILT_IN = ["llama", "llama-gqa3", "llama-mha", "llama-mqa", "mistral", "phi3", "qwen2", "qwen3"]
GROUPS = {"llama-gqa3": 3, "llama-mha": 1, "llama-mqa": 4}


def test_list_has_the_built_in_ones() -> None:
    assert set(testbed.tiny_archs()) >= set(BUILT_IN)


@pytest.mark.parametrize("arch", BUILT_IN)
def test_forward_and_shapes(arch: str) -> None:
    model = testbed.tiny(arch)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        out = model(torch.arange(7)[None], use_cache=True)
    assert out.logits.shape == (1, 7, model.config.vocab_size)
    # What a key-value tool sees: heads and head size in the cache.
    keys = out.past_key_values.layers[0].keys
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert keys.shape == (1, config.num_key_value_heads, 7, head_dim)
    assert config.num_attention_heads // config.num_key_value_heads == GROUPS.get(arch, 2)


@pytest.mark.parametrize("arch", BUILT_IN)
def test_it_is_causal_and_position_matters(arch: str) -> None:
    model = testbed.tiny(arch)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        whole, start = model(ids).logits, model(ids[:, :8]).logits
        turned = model(torch.cat([ids[:, 1:2], ids[:, 0:1], ids[:, 2:]], 1)).logits
    torch.testing.assert_close(whole[:, :8], start, atol=1e-5, rtol=1e-4)
    # Attention is peaked enough for an exchange of two early tokens to show at the end.
    assert (whole[:, -1] - turned[:, -1]).abs().max() > 1e-2


def test_seed_decides_the_weights() -> None:
    def first(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in testbed.tiny("qwen2", seed=seed).parameters()])

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    testbed.tiny("llama", seed=9)
    assert torch.equal(before, torch.get_rng_state())


def test_biases_and_norms_are_not_neutral() -> None:
    parameters = dict(testbed.tiny("qwen2").named_parameters())
    assert parameters["model.layers.0.self_attn.q_proj.bias"].abs().min() > 0
    assert (parameters["model.norm.weight"] - 1).abs().max() > 0.05


def test_overrides() -> None:
    model = testbed.tiny("llama", num_hidden_layers=3, attn_implementation="eager")
    assert len(model.model.layers) == 3
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="LlamaConfig has no field 'num_layers_hidden'"):
        testbed.tiny("llama", num_layers_hidden=3)


def test_unknown_arch_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="one of .*llama-gqa3.*qwen3.*; got 'gpt5'"):
        testbed.tiny("gpt5")


def test_plugins_come_through_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from testbed import tiny_models

    point = EntryPoint("from-elsewhere", "builtins:dict", "testbed.tiny")
    monkeypatch.setattr(tiny_models, "entry_points", lambda group: [point])
    assert "from-elsewhere" in testbed.tiny_archs()
    assert testbed.tiny("from-elsewhere", seed=4, depth=2) == {"seed": 4, "depth": 2}
