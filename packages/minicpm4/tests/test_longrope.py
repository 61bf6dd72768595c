"""LongRoPE against transformers' own, complex rotation, and the switch at the original length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minicpm4 import MiniCPM4Config, preset
from minicpm4.longrope import RotaryEmbedding, attention_factor, inverse_frequencies, rotate
from minicpm4.presets import tiny

D, ORIGINAL = 64, 32


def config(**rope: Any) -> MiniCPM4Config:
    factors = {
        "short_factor": [1.0 + i / 10 for i in range(D // 2)],
        "long_factor": [2.0 + i for i in range(D // 2)],
        "original_max_position_embeddings": ORIGINAL,
    }
    return preset("nano", rope_scaling={"rope_type": "longrope", **factors, **rope})


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_equals_transformers_on_both_sides_of_the_switch(length: int) -> None:
    ours = RotaryEmbedding(config())
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](config(), seq_len=length)
    positions = torch.arange(length)[None]
    angles = positions[..., None].float() * frequencies
    cos, sin = ours(positions, torch.float32)
    assert cos.shape == sin.shape == (1, length, D)
    for got, wanted in ((cos, angles.cos()), (sin, angles.sin())):
        wanted = torch.cat((wanted, wanted), -1) * scale
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_the_largest_position_decides_not_the_number_of_positions() -> None:
    ours = RotaryEmbedding(config())
    inside, outside = torch.tensor([[0, ORIGINAL - 1]]), torch.tensor([[0, ORIGINAL]])
    scale = ours.scaling
    for positions, factors in ((inside, "short_factor"), (outside, "long_factor")):
        divisors = torch.tensor(config().rope_parameters[factors], dtype=torch.float64)
        angle = int(positions[0, 1]) / (divisors * 10000.0 ** (torch.arange(0, D, 2) / D))
        wanted = (angle.cos() * scale).float()
        got = ours(positions, torch.float32)[0][0, 1, : D // 2]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_attention_factor_closed_form() -> None:
    assert attention_factor(32768, 32768) == attention_factor(8, 16) == 1.0
    assert attention_factor(131072, 32768) == math.sqrt(1 + math.log(4) / math.log(32768))
    assert RotaryEmbedding(config(attention_factor=1.5)).scaling == 1.5
    assert RotaryEmbedding(preset("nano")).scaling == 1.0


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    x = torch.randn(2, 3, 5, D)
    positions = torch.randint(0, 1000, (2, 5))
    rope = RotaryEmbedding(preset("nano"))
    got = rotate(x, *rope(positions, torch.float32))
    as_complex = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double())
    angles = positions[:, None, :, None] * (10000.0 ** -(torch.arange(0, D, 2).double() / D))
    turned = as_complex * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat((turned.real, turned.imag), -1).float()
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=0)
    assert rotate(x.bfloat16(), *rope(positions, torch.bfloat16)).dtype == torch.bfloat16


def test_scores_depend_on_distance_alone() -> None:
    rope = RotaryEmbedding(config())
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def score(at: int, back: int) -> float:
        cos, sin = rope(torch.tensor([[at - back, at]]), torch.float32)
        return float((rotate(q, cos[:, 1:], sin[:, 1:]) * rotate(k, cos[:, :1], sin[:, :1])).sum())

    assert score(9, 4) == pytest.approx(score(30, 4), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_keys_cached_before_the_switch_keep_their_factors() -> None:
    """As the published model: crossing with a cache is not one pass over the whole text."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 16,
    }
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    for factors, same in (([8.0] * 8, False), ([1.0] * 8, True)):
        model = tiny(rope_scaling={**rope, "long_factor": factors})
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :16], use_cache=True).past_key_values
        with_cache = model(ids[:, 16:], past_key_values=cache).logits[:, -1]
        assert torch.allclose(whole, with_cache, atol=1e-4) == same
        # Beyond the switch from the first token on, cache and whole pass agree again.
        start = model(ids[:, :17], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, 17:], past_key_values=start).logits[:, -1], whole)


def test_a_list_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="LongRoPE needs 4 factors for head_dim 8, got 3"):
        inverse_frequencies(10000.0, 8, [1.0] * 3)
