"""What config.json may say, in the styles of transformers 4 and 5, and what it may not."""

from __future__ import annotations

import json

import pytest

from cpmcu._fields import Fields
from cpmcu.spec import from_config, from_folder

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def spec(**changes):
    values = {k: v for k, v in (LLAMA | changes).items() if v != "absent"}
    return from_config(Fields(values, "config.json"))


def test_defaults():
    made = spec(num_key_value_heads=None)
    assert (made.kv_heads, made.head_dim, made.tie, made.bos, made.eos) == (4, 16, False, None, ())
    assert made.rope.theta == 10_000.0 and made.rope.kind == "default"


def test_both_styles_of_rope_settings_agree():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64} | FACTORS
    old = spec(rope_theta=5e5, rope_scaling={"type": "longrope"} | scaling)
    new = spec(rope_parameters={"rope_type": "longrope", "rope_theta": 5e5} | scaling)
    assert old.rope == new.rope
    assert old.rope.attention_factor == pytest.approx((1 + 4**0 / 3) ** 0.5)  # ln 4 / ln 64 = 1/3
    assert spec(rope_scaling={"type": "su"} | scaling).rope.kind == "longrope"


def test_longrope_factor_comes_from_the_two_lengths():
    made = spec(
        rope_scaling={"type": "longrope", "original_max_position_embeddings": 128} | FACTORS
    )
    assert made.rope.attention_factor == 1.0  # MiniCPM4: nothing was extended
    assert not made.rope.is_long(128) and made.rope.is_long(129)


def test_minicpm_scales():
    made = spec(model_type="minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=16)
    assert (made.embed_scale, made.logit_scale) == (12.0, 0.25)
    assert made.residual_scale == pytest.approx(1.4 / 2**0.5)
    assert made.tie  # the published class's default
    off = spec(model_type="minicpm4", scale_emb=1, scale_depth=None, dim_model_base=None)
    assert (off.residual_scale, off.logit_scale) == (pytest.approx(1.0), 1.0)


def test_parameters_count_the_tensors():
    from math import prod

    for changes in (
        {},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "tie_word_embeddings": True},
    ):
        made = spec(**changes)
        assert made.parameters == sum(prod(shape) for shape in made.tensors().values())


def test_generation_config_adds_ends(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert from_folder(tmp_path).eos == (2, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'model_type' is 'gpt2', supported are llama, mistral"),
        ({"model_type": "absent"}, "'model_type' is missing"),
        ({"hidden_size": "absent"}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' must be an integer, got str '64'"),
        ({"hidden_size": True}, "'hidden_size' must be an integer, got bool"),
        ({"hidden_size": 0}, r"'hidden_size' must be in \[1, 2147483648\], got 0"),
        ({"hidden_size": 66}, "'hidden_size' must be a multiple of 4 heads"),
        ({"num_hidden_layers": 10**9}, r"'num_hidden_layers' must be in \[1, 10000\]"),
        ({"num_key_value_heads": 3}, "'kv_heads' must divide heads=4, got 3"),
        ({"head_dim": 15}, "'head_dim' must be even"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a finite number above 0"),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' must be a finite number"),
        ({"hidden_act": "gelu"}, "'hidden_act' must be 'silu'"),
        ({"attention_bias": True}, "'attention_bias' is true, which"),
        ({"attention_bias": "yes"}, "'attention_bias' must be true or false"),
        ({"eos_token_id": 256}, "'eos' must be below vocab=256"),
        ({"eos_token_id": ["a"]}, "'eos_token_id' must be a token id or a list"),
        ({"rope_scaling": "linear"}, "'rope_scaling' must be a mapping"),
        ({"rope_scaling": {"type": "yarn"}}, "'rope_type' is 'yarn', supported are default"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "longrope"}}, "'short_factor' is missing"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "'short_factor' must be a list of 8 positive numbers",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' must be 1"),
        ({"model_type": "minicpm"}, "'scale_emb' is missing"),
        ({"use_sliding_window": True}, "'use_sliding_window' is true"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^config.json.*{message}"):
        spec(**changes)
