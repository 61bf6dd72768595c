from __future__ import annotations

import copy

import pytest
import torch

from bitcpm import (
    PackedTensor,
    PackedTernaryLinear,
    TernaryConfig,
    load_packed_model,
    materialise,
    pack_layers,
    pack_model,
    ternarize,
    unpack_layers,
)
from bitcpm.cpu_library import CODECS, MODES, kernels
from bitcpm.packed_linear import packed_layers

pytestmark = pytest.mark.skipif(kernels()[0] is None, reason=kernels()[1])
TEXT = torch.arange(1, 25).reshape(2, 12)


@pytest.fixture(params=["llama-gqa3", "qwen3", "phi3"])
def ternary_model(request, tiny):
    return materialise(ternarize(tiny(request.param), TernaryConfig(group_size=32)))


@torch.no_grad()
def test_exact_logits_are_the_plain_models(ternary_model):
    plain = ternary_model(TEXT).logits
    seen = []
    for codec in CODECS:
        model = pack_layers(
            copy.deepcopy(ternary_model), TernaryConfig(group_size=32), codec, "exact"
        )
        assert len(list(packed_layers(model))) > 4
        seen.append(model(TEXT).logits)
        assert (seen[-1] - plain).abs().max() < 1e-5 * plain.abs().max()
        again = unpack_layers(model)
        for (name, a), (_, b) in zip(
            again.named_parameters(), ternary_model.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name
        assert torch.equal(again(TEXT).logits, plain)
    assert torch.equal(*seen), "bit for bit the same in both codecs"


@torch.no_grad()
def test_int8_logits_are_near_and_do_not_depend_on_the_batch(ternary_model):
    plain = ternary_model(TEXT).logits
    for mode in ("int8", "int8-group"):
        model = pack_layers(copy.deepcopy(ternary_model), TernaryConfig(group_size=32), mode=mode)
        logits = model(TEXT).logits
        assert 0 < (logits - plain).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("codec", [None, *CODECS])
@pytest.mark.parametrize("mode", MODES)
def test_a_packed_folder_generates_through_the_kernels(ternary_folder, tmp_path, mode, codec):
    pack_model(ternary_folder, tmp_path / "packed")
    plain = load_packed_model(tmp_path / "packed", torch.float32)
    model = load_packed_model(tmp_path / "packed", torch.float32, mode, codec)
    layers = dict(packed_layers(model))
    assert len(layers) == 14 and not any("head" in name for name in layers)
    assert all(layer.matrix.codec == (codec or "1.6bit") for layer in layers.values())
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    out = model.generate(TEXT, **options)
    assert out.shape == (2, 20)
    if mode == "exact":
        assert torch.equal(out, plain.generate(TEXT, **options))
    with torch.no_grad():
        near = (model(TEXT).logits - plain(TEXT).logits).abs().max()
        assert near < (1e-5 if mode == "exact" else 0.05) * plain(TEXT).logits.abs().max()


def test_bf16_models_and_state_dicts(ternary_folder, tmp_path):
    pack_model(ternary_folder, tmp_path / "packed")
    model = load_packed_model(tmp_path / "packed", mode="exact")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(TEXT).logits
        assert logits.dtype == torch.bfloat16
        other = copy.deepcopy(model)
        for _, layer in packed_layers(other):
            layer.layout.zero_()
        assert not torch.equal(other(TEXT).logits, logits), "the copy is independent"
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(TEXT).logits, logits)


def test_layers_are_replaced_and_restored_with_their_bias():
    linear = torch.nn.Linear(96, 40)
    linear.weight.data = linear.weight.data.sign() * 0.1
    layer = PackedTernaryLinear(PackedTensor.from_weights(linear.weight.detach(), -1), linear.bias)
    x = torch.randn(5, 96)
    with torch.no_grad():
        assert torch.allclose(layer(x), linear(x), atol=0.06)
    back = layer.to_linear()
    assert torch.equal(back.weight, linear.weight) and torch.equal(back.bias, linear.bias)
    assert "in_features=96, out_features=40, group_size=-1, 1.6bit, int8" in repr(layer)


def test_errors_say_what_is_wrong(tiny):
    layer = PackedTernaryLinear(PackedTensor.from_weights(torch.ones(8, 16), -1))
    with pytest.raises(ValueError, match="no gradient"):
        layer(torch.randn(2, 16, requires_grad=True))
    with pytest.raises(ValueError, match="no ternary linear layer"):
        pack_layers(tiny("llama"))
    model = materialise(ternarize(tiny("llama"), TernaryConfig(group_size=24)))
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="is not ternary in groups of 32"):
        pack_layers(model, TernaryConfig(group_size=32))
    assert [type(m) for m in model.modules()] == before
