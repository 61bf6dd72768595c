"""GPTQ against least squares solved step by step, closed forms and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from cpmcu.codes import Codes, nearest, nearest_codes, stack
from cpmcu.gptq import Hessian, damped, gptq, inverse_factor, objective


def problem(O, I, tokens=512, seed=0, correlated=0.7):
    """A weight and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(I) + correlated * torch.randn(I, I, generator=generator) / I**0.5
    x = torch.randn(tokens, I, generator=generator) @ mix
    x *= torch.rand(I, generator=generator) * 3 + 0.1
    hessian = Hessian(I)
    hessian.add(x[None])
    return torch.randn(O, I, generator=generator), hessian.matrix, x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("search", [False, True])
def test_identity_hessian_rounds_to_nearest(bits, group, search):
    weight, _, _ = problem(5, 256)
    made = gptq(weight, torch.eye(256), bits, group, search=search, damp=0.0)
    wanted = nearest(weight, bits, group, search=search)
    assert torch.equal(made.codes, wanted.codes) and torch.equal(made.scales, wanted.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_least_squares_solved_at_every_step(bits, act_order):
    """After each column the rest is solved for anew with lstsq: no Cholesky, no running update."""
    weight, hessian, x = problem(6, 64)
    made = gptq(weight, hessian, bits, 32, damp=0.0, act_order=act_order, search=False)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(64)
    x, w = x.double()[:, order], weight.double()[:, order]
    target, left = x @ w.T, w.clone()
    held = torch.zeros_like(w)
    for i in range(64):
        scale = made.scales[:, int(order[i]) // 32]
        code = nearest_codes(left[:, i : i + 1], scale, bits)[:, 0]
        assert torch.equal(code.to(torch.int8), made.codes[:, order[i]]), i
        held[:, i] = code * scale.double()
        if i < 63:
            rest = target - x[:, : i + 1] @ held[:, : i + 1].T
            left[:, i + 1 :] = torch.linalg.lstsq(x[:, i + 1 :], rest).solution.T


def test_objective_is_the_sum_of_the_steps_own_errors():
    """Closed form: each step adds (lost / U_ii)², and nothing that comes later changes it."""
    weight, hessian, _ = problem(4, 96)
    made = gptq(weight, hessian, 4, 32, damp=0.03)
    u = inverse_factor(damped(hessian, 0.03))
    lost = weight.double() - made.dequantise().double()
    steps = torch.linalg.solve_triangular(u.T, lost.T, upper=False)  # lost = steps · U, by rows
    assert float(steps.square().sum()) == pytest.approx(
        objective(weight, made.dequantise(), damped(hessian, 0.03)), rel=1e-6
    )


def test_objective_is_the_output_error():
    weight, hessian, x = problem(4, 64)
    held = nearest(weight, 4).dequantise()
    wanted = float((x.double() @ (weight - held).double().T).square().sum())
    assert objective(weight, held, hessian) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_beats_rounding(group, act_order):
    weight, hessian, _ = problem(16, 256, tokens=2048)
    made = gptq(weight, hessian, 4, group, act_order=act_order)
    error = objective(weight, made.dequantise(), hessian)
    for search in (False, True):
        plain = objective(weight, nearest(weight, 4, group, search=search).dequantise(), hessian)
        assert error < 0.7 * plain


def test_close_to_the_best_of_all_codes():
    """Four columns whose inputs are correlated, brute force; a fifth sets a scale with room."""
    ours, plain, best = 0.0, 0.0, 0.0
    for seed in range(12):
        weight, _, _ = problem(1, 32, seed=seed)
        weight[:, 4:] = 0
        weight[:, 4] = 2 * weight.abs().max()
        _, small, _ = problem(1, 4, tokens=24, seed=seed)
        hessian = torch.eye(32, dtype=torch.float64) * float(small.diagonal().mean())
        hessian[:4, :4] = small
        made = gptq(weight, hessian, 4, 32, damp=0.0, search=False)
        scale = made.scales[0, 0].double()
        grid = torch.tensor(list(itertools.product(range(-8, 8), repeat=4))).double() * scale
        lost = weight[0, :4].double() - grid
        best += float(((lost @ small) * lost).sum(1).min())
        ours += objective(weight, made.dequantise(), hessian)
        plain += objective(weight, nearest(weight, 4).dequantise(), hessian)
    assert best <= ours < 0.5 * (best + plain)


def test_prefix_outliers_spoil_gptq_but_not_p_gptq():
    """First positions ten times as large, in a direction of their own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 64, 64, generator=generator)
    x = x @ (torch.eye(64) + 0.5 * torch.randn(64, 64, generator=generator) / 8)
    x[:, :4] = 60 * torch.randn(64, generator=generator) + x[:, :4]
    weight = torch.randn(32, 64, generator=generator)
    errors = []
    for skip, level in ((0, False), (4, False), (4, True)):
        hessian = Hessian(64, skip=skip, level=level)
        hessian.add(x)
        assert hessian.tokens == 16 * (64 if level else 64 - skip)
        lost = weight - gptq(weight, hessian.matrix, 4, 32).dequantise()
        errors.append(float((x[:, 4:] @ lost.T).square().sum()))
    assert max(errors[1:]) < 0.9 * errors[0]


def test_a_column_that_only_the_prefix_uses_is_kept_by_levelling():
    """Left out, its weights are free to take up others' errors; the first token then breaks."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 64, 64, generator=generator)
    x[:, 1:, 40] *= 1e-3
    x[:, 1:, 40] += 1e-2 * x[:, 1:, 3]  # small, but it goes with another column
    x[:, 0] = 0
    x[:, 0, 40] = 300.0
    weight = torch.randn(32, 64, generator=generator)
    first = []
    for level in (False, True):
        hessian = Hessian(64, skip=4, level=level)
        hessian.add(x)
        lost = weight - gptq(weight, hessian.matrix, 4, 32, damp=1e-6).dequantise()
        first.append(float((x[:, 0] @ lost.T).square().sum()))
    assert first[1] < 0.5 * first[0]


def test_inputs_that_are_always_zero_and_fewer_tokens_than_columns():
    weight, _, x = problem(3, 64, tokens=20)
    x[:, 7] = 0
    hessian = Hessian(64)
    hessian.add(x[None])
    made = gptq(weight, hessian.matrix, 4, 32)
    assert bool(made.dequantise().isfinite().all())


def test_zero_groups_stay_zero():
    weight, hessian, _ = problem(3, 64)
    weight[:, :32] = 0
    assert not gptq(weight, hessian, 4, 32).dequantise()[:, :32].any()


def test_search_never_loses_by_its_own_measure():
    weight, _, _ = problem(40, 128)
    for bits in (4, 8):
        errors = [
            float((weight - nearest(weight, bits, 32, search=s).dequantise()).square().sum())
            for s in (False, True)
        ]
        assert errors[1] <= errors[0]


@pytest.mark.parametrize(
    ("weight", "hessian", "arguments", "message"),
    [
        (torch.ones(2, 48), torch.eye(48), (4, 32), "do not divide 48 columns"),
        (torch.ones(2, 96), torch.eye(96), (4, 128), r"take one of \[32\]"),
        (torch.ones(2, 32), torch.eye(32), (3, 32), "bits must be one of"),
        (torch.ones(2, 32), torch.eye(32), (4, 16), "group must be one of"),
        (torch.ones(2, 32), torch.eye(31), (4, 32), r"hessian must be \[32, 32\]"),
        (torch.ones(2, 32), -torch.eye(32), (4, 32), "no positive definite Hessian"),
        (torch.full((2, 32), torch.nan), torch.eye(32), (4, 32), "weights are not finite"),
    ],
)
def test_errors_say_what_is_wrong(weight, hessian, arguments, message):
    with pytest.raises(ValueError, match=message):
        gptq(weight, hessian, *arguments, damp=0.0)


def test_codes_check_their_parts_and_regroup():
    codes = nearest(problem(4, 128)[0], 4, 128)
    assert torch.equal(codes.regrouped(32).dequantise(), codes.dequantise())
    assert torch.equal(stack([codes, codes]).dequantise()[4:], codes.dequantise())
    with pytest.raises(ValueError, match="cannot be split"):
        codes.regrouped(96)
    with pytest.raises(ValueError, match="need scales"):
        Codes(codes.codes, codes.scales[:2], 4)
    with pytest.raises(ValueError, match="must be of one kind"):
        stack([codes, nearest(problem(4, 128)[0], 8, 128)])
