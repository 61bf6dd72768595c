"""The published `config.json` loads unchanged, and nonsense is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minicpm4 import MiniCPM4Config, MiniCPM4ForCausalLM, load, preset, register
from minicpm4.configuration import PublishedMiniCPMConfig

# In the spelling of the published files, at a size that is quick: remote code in auto_map,
# `rope_scaling`, `rope_theta`, `torch_dtype`, and, as in the 0.5B's, no `tie_word_embeddings`.
PUBLISHED = """{
  "architectures": ["MiniCPMForCausalLM"],
  "auto_map": {
    "AutoConfig": "configuration_minicpm.MiniCPMConfig",
    "AutoModel": "modeling_minicpm.MiniCPMModel",
    "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    "AutoModelForSeq2SeqLM": "modeling_minicpm.MiniCPMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minicpm.MiniCPMForSequenceClassification"
  },
  "bos_token_id": 1,
  "eos_token_id": [2, 73],
  "pad_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 64,
  "initializer_range": 0.1,
  "intermediate_size": 128,
  "max_position_embeddings": 128,
  "model_type": "minicpm",
  "mup_denominator": 32,
  "num_attention_heads": 8,
  "num_hidden_layers": 3,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
  "rope_scaling": {
    "rope_type": "longrope",
    "long_factor": [4.0, 3.0, 2.0, 1.5],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "original_max_position_embeddings": 32
  },
  "sparse_config": {
    "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64,
    "window_size": 2048, "topk": 64, "use_nope": false, "dense_len": 8192
  },
  "torch_dtype": "bfloat16",
  "transformers_version": "4.46.3",
  "use_cache": true,
  "vocab_size": 128,
  "scale_emb": 12,
  "dim_model_base": 16,
  "scale_depth": 1.4
}"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as it would be downloaded: published configuration and tensor names."""
    raw = json.loads(PUBLISHED)
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.1).bfloat16()

    weights = {"model.embed_tokens.weight": tensor(128, 64), "model.norm.weight": tensor(64)}
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": tensor(64),
            f"{at}.post_attention_layernorm.weight": tensor(64),
            f"{at}.self_attn.q_proj.weight": tensor(64, 64),
            f"{at}.self_attn.k_proj.weight": tensor(16, 64),
            f"{at}.self_attn.v_proj.weight": tensor(16, 64),
            f"{at}.self_attn.o_proj.weight": tensor(64, 64),
            f"{at}.mlp.gate_proj.weight": tensor(128, 64),
            f"{at}.mlp.up_proj.weight": tensor(128, 64),
            f"{at}.mlp.down_proj.weight": tensor(64, 128),
        }
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(PUBLISHED)
    return tmp_path


def test_a_published_folder_loads_by_every_door(published: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    register()
    register()
    config = AutoConfig.from_pretrained(published)
    assert type(config) is PublishedMiniCPMConfig
    raw = json.loads(PUBLISHED)
    for name in ("sparse_config", "mup_denominator", "scale_emb", "scale_depth", "dim_model_base"):
        assert getattr(config, name) == raw[name]
    assert config.rope_parameters == {**raw["rope_scaling"], "rope_theta": 10000.0}
    # Remote code must lose even where the user allows it: the folder holds none to run.
    causal = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    assert type(causal).__name__ == "MiniCPMForCausalLM" and isinstance(causal, MiniCPM4ForCausalLM)
    assert causal.dtype == torch.bfloat16
    weights = load_file(published / "model.safetensors")
    for name, value in causal.state_dict().items():
        # No tie_word_embeddings in the file means a tied head, as in the published class.
        source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        assert torch.equal(value, weights[source]), name
    body = AutoModel.from_pretrained(published)
    ids = torch.arange(7)[None]
    assert torch.equal(body(ids).last_hidden_state, causal.model(ids).last_hidden_state)
    assert torch.equal(load(published)(ids).logits, causal(ids).logits)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_what_is_saved_loads_again_equal(published: Path, tmp_path: Path, shard: str) -> None:
    model = load(published)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    again = load(tmp_path / "again")
    before, after = ({**m.config.to_dict(), "_name_or_path": ""} for m in (model, again))
    assert after == before
    ids = torch.arange(40)[None]  # crosses original_max_position_embeddings: buffers are right too
    assert torch.equal(again(ids).logits, model(ids).logits)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["model_type"] == "minicpm" and saved["architectures"] == ["MiniCPMForCausalLM"]
    assert saved["sparse_config"] == json.loads(PUBLISHED)["sparse_config"]


def test_both_spellings_of_rope_mean_the_same_and_the_callers_dictionary_is_spared() -> None:
    rope = {"long_factor": [2.0] * 32, "short_factor": [1.0] * 32}
    rope["original_max_position_embeddings"] = 16
    given = {"type": "longrope", **rope}
    old = preset("nano", rope_scaling=given, rope_theta=5e5)
    assert given == {"type": "longrope", **rope}
    new = preset("nano", rope_parameters={"rope_type": "longrope", "rope_theta": 5e5, **rope})
    assert old.to_dict() == new.to_dict()
    assert MiniCPM4Config().rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple of num_key_value"),
        ({"hidden_size": 100, "num_attention_heads": 8}, "hidden_size 100 is not a multiple"),
        ({"head_dim": 7}, "head_dim must be even for RoPE, got 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1"),
        ({"vocab_size": 1.5}, "vocab_size must be a whole number"),
        ({"scale_depth": 0}, "scale_depth must be positive"),
        ({"dim_model_base": -1}, "dim_model_base must be positive"),
        ({"num_experts": 8}, "num_experts is 8: mixtures of experts"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not MiniCPM4's"),
        ({"rope_scaling": {"type": "longrope"}}, "short_factor must list head_dim / 2 = 32"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1]}},
            "long_factor must list head_dim / 2 = 32 numbers, got 1",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [0.0] * 32,
                    "long_factor": [1.0] * 32,
                }
            },
            "short_factor must hold positive numbers",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_fields_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("nano", **fields)
