from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bitcpm import (
    TernaryConfig,
    TernaryLinear,
    materialise,
    quantisation_stats,
    ternarize,
    unternarize,
)
from bitcpm.qat import fake_quantise, straight_through, ternary_layers

ARCHITECTURES = ("llama", "llama-gqa3", "qwen3", "phi3", "mistral")
CONFIG = TernaryConfig(group_size=32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradient_is_the_identity(dtype):
    w = torch.randn(8, 80, dtype=dtype, requires_grad=True)
    upstream = torch.randn(8, 80, dtype=dtype)
    out = straight_through(w, CONFIG)
    assert torch.equal(out, fake_quantise(w.detach(), CONFIG))
    (grad,) = torch.autograd.grad(out, w, upstream)
    assert torch.equal(grad, upstream)


def test_the_usual_formula_would_not_be_exact_in_bf16():
    w = torch.randn(8, 128, dtype=torch.bfloat16)
    exact = straight_through(w)
    assert not torch.equal(w + (exact - w).detach(), exact)


def test_layer_gradients_are_those_of_a_linear_layer_with_the_quantised_weight():
    torch.manual_seed(0)
    layer = TernaryLinear(80, 6, config=CONFIG)
    plain = nn.Linear(80, 6)
    with torch.no_grad():
        plain.weight.copy_(fake_quantise(layer.weight, CONFIG))
        plain.bias.copy_(layer.bias)
    x, x2 = (torch.randn(5, 80, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_(), x2.requires_grad_()
    layer(x).square().sum().backward()
    plain(x2).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)
    assert torch.equal(x.grad, x2.grad)


def test_nan_stays_visible():
    w = torch.randn(2, 64)
    w[0, 3] = math.nan
    q = straight_through(w, CONFIG)
    assert q[0, :32].isnan().any() and q[0, 32:].isfinite().all() and q[1].isfinite().all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ternarize_and_back(arch, tiny):
    model = tiny(arch)
    before = copy.deepcopy(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    x = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))
    plain = model(x).logits

    assert ternarize(model, CONFIG) is model
    names = {name for name, _ in ternary_layers(model)}
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert names == linear - {"lm_head"} and len(names) >= 8
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    ternary = model(x).logits
    assert not torch.equal(ternary, plain)

    # The oracle: a plain model whose weights were quantised one by one.
    oracle = tiny(arch, seed=1)
    state = copy.deepcopy(before)
    for name in names:
        state[f"{name}.weight"] = fake_quantise(state[f"{name}.weight"], CONFIG)
    oracle.load_state_dict(state)
    assert torch.equal(oracle(x).logits, ternary)

    unternarize(model)
    assert torch.equal(model(x).logits, plain)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any("ternary" in vars(m) or "_seen" in vars(m) for m in model.modules())

    assert torch.equal(materialise(ternarize(model, CONFIG))(x).logits, ternary)
    assert not list(ternary_layers(model))
    for name in names:
        groups = model.get_submodule(name).weight.detach().split(32, dim=1)
        assert all(len(row.unique()) <= 3 for group in groups for row in group)


def test_checkpoint_during_qat_loads_into_a_plain_model(tmp_path, tiny):
    from transformers import AutoModelForCausalLM

    model = ternarize(tiny("llama"), CONFIG)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("where", ("head", "elsewhere"))
def test_tied_weights_are_left_alone(where, tiny):
    model = tiny("llama", tie_word_embeddings=True)
    if where == "elsewhere":
        model.extra = nn.Linear(48, 96, bias=False)
        model.extra.weight = model.model.embed_tokens.weight
    ternarize(model, CONFIG)
    assert type(model.lm_head) is nn.Linear
    assert where == "head" or type(model.extra) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_any_name_is_kept():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, **sizes))
    head = model.get_output_embeddings()
    ternarize(model, TernaryConfig(skip=()))
    assert type(head) is nn.Linear and model.get_output_embeddings() is head
    assert len(list(ternary_layers(model))) == 4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_works_under_autocast_and_gradient_checkpointing(tiny):
    x = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    grads = []
    for checkpointing in (False, True):
        model = ternarize(tiny("llama").train(), CONFIG)
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, labels=x).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.grad.count_nonzero() > 0.9 * weight.numel()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_layer_compiles_in_one_graph():
    layer = TernaryLinear(80, 6, config=CONFIG)
    x = torch.randn(3, 80)
    # "aot_eager" traces forward and backward and needs no C++ compiler.
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    grads = []
    for f in (compiled, layer):
        layer.zero_grad()
        f(x).square().sum().backward()
        grads.append(layer.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_stats_count_zeros_flips_and_drift():
    model = nn.Sequential(TernaryLinear(64, 4, config=CONFIG))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1.0, 0.0]).repeat(32)
    (first,) = quantisation_stats(model).values()
    assert (first.zero_share, first.mean_scale) == (0.5, 0.5)
    assert first.flip_share is None and first.scale_drift is None
    with torch.no_grad():
        model[0].weight[0, :32] *= -2.0
    (second,) = quantisation_stats(model).values()
    # One group of eight: its 16 ones of 256 weights change sign, and its scale doubles.
    assert second.flip_share == 16 / 256 and second.scale_drift == 1 / 8
    (third,) = quantisation_stats(model).values()
    assert third.flip_share == 0 and third.scale_drift == 0
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_refusals_leave_the_model_as_it_was(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match="no nn.Linear to make ternary"):
        ternarize(model, TernaryConfig(skip=("model",)))
    ternarize(model, CONFIG)
    with pytest.raises(ValueError, match=r"q_proj is ternary already: call unternarize"):
        ternarize(model, CONFIG)
    materialise(model).to(torch.bfloat16)
    with pytest.raises(ValueError, match="pseudo-quantised already"):
        # Another size than the weights have: absmean would do harm all the same.
        ternarize(model, TernaryConfig(group_size=-1))
    assert not list(ternary_layers(model))
    with pytest.raises(ValueError, match="no ternary layer"):
        quantisation_stats(model)


def test_unknown_linear_classes_and_replaced_forwards_are_refused():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(ValueError, match="1 is a Odd"):
        ternarize(nn.Sequential(nn.Linear(16, 16), Odd(16, 16)))
    ternarize(nn.Sequential(nn.Linear(16, 16), Odd(16, 16)), TernaryConfig(skip=("1",)))
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"0\.forward was replaced"):
        ternarize(model)


def test_optimiser_and_hooks_survive(tiny):
    model = tiny("llama")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: calls.append(1))
    ternarize(model, CONFIG)
    old = layer.weight.detach().clone()
    x = torch.randint(0, 96, (1, 8))
    model(x, labels=x).loss.backward()
    optimiser.step()
    assert calls == [1]
    torch.testing.assert_close(layer.weight, old - 0.1 * layer.weight.grad)
