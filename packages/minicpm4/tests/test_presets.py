"""Published sizes against the published parameter counts, and the small ladder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minicpm4 import MiniCPM4ForCausalLM, load, preset
from minicpm4.presets import FACTORS_05B, FACTORS_8B, PRESETS, tiny


def parameters(name: str, **overrides: object) -> int:
    with torch.device("meta"):
        model = MiniCPM4ForCausalLM(preset(name, **overrides))
    return sum(p.numel() for p in model.parameters())


def by_hand(d: int, layers: int, q: int, kv: int, ffn: int, vocab: int, heads: int) -> int:
    """Two norms, four projections (q and kv are total widths) and three matrices a layer."""
    layer = 2 * d + 2 * d * q + 2 * d * kv + 3 * d * ffn
    return layers * layer + d + vocab * d * heads


def test_published_sizes_have_the_published_parameters() -> None:
    assert parameters("8b") == by_hand(4096, 32, 4096, 256, 16384, 73448, 2)
    assert round(parameters("8b") / 1e9, 1) == 8.2
    assert parameters("0.5b") == by_hand(1024, 24, 1024, 128, 4096, 73448, 1)
    assert round(parameters("0.5b") / 1e9, 2) == 0.43


@pytest.mark.parametrize(("name", "factors"), [("8b", FACTORS_8B), ("0.5b", FACTORS_05B)])
def test_published_sizes_have_the_published_rope_and_sparse_settings(
    name: str, factors: list[float]
) -> None:
    config = preset(name)
    rope = config.rope_parameters
    assert rope["short_factor"] == rope["long_factor"] == factors
    assert rope["original_max_position_embeddings"] == config.max_position_embeddings == 32768
    assert len(factors) == config.head_dim // 2
    # The published lists are symmetric about their middle, to fp32: no entry is mistyped.
    sums = [a + b for a, b in zip(factors, reversed(factors), strict=True)]
    assert max(sums) - min(sums) < 1e-5
    assert factors == sorted(factors)
    assert config.sparse_config["topk"] == 64 and config.sparse_config["dense_len"] == 8192


def test_the_small_ladder_grows_and_starts_at_its_base_width() -> None:
    nano, micro, mini = (preset(name) for name in ("nano", "micro", "mini"))
    assert nano.width_ratio == 1 < micro.width_ratio < mini.width_ratio
    assert parameters("nano") < parameters("micro") < parameters("mini") < 6e6
    for config in (nano, micro, mini):
        assert config.intermediate_size == 4 * config.hidden_size  # as the 8B and the 0.5B


def test_a_presets_configuration_is_the_callers_to_change() -> None:
    config = preset("8b", num_hidden_layers=1)
    config.sparse_config["topk"] = 1
    config.rope_parameters["short_factor"][0] = 99.0
    assert preset("8b").sparse_config["topk"] == 64
    assert preset("8b").rope_parameters["short_factor"][0] == FACTORS_8B[0] != 99.0
    with pytest.raises(ValueError, match="unknown preset '9b': expected one of 8b, 0.5b"):
        preset("9b")
    assert set(PRESETS) == {"8b", "0.5b", "mini", "micro", "nano"}


def test_tiny_is_a_function_of_its_seed_and_spares_the_global_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = tiny(), tiny(0), tiny(1)
    assert torch.equal(torch.rand(3), expected)
    assert not first.training and sum(p.numel() for p in first.parameters()) < 1e6
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == ("norm" in name)
    assert tiny(num_hidden_layers=1).config.num_hidden_layers == 1


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(tmp_path)
    tiny().save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: expected model.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type is 'llama', expected 'minicpm'"):
        load(tmp_path)
