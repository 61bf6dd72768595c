from __future__ import annotations

import pytest
import torch

from locret import RetainingHead, importance, qkv_input, retaining_loss
from locret.retaining_head import top_loss


def test_forward_is_the_formula() -> None:
    head = RetainingHead(40, 2, hidden=8)
    q, k, v = torch.randn(1, 6, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    found = head(qkv_input(q, k, v))
    assert found.shape == (1, 2, 3)
    x = torch.cat([q[0, :, 1].flatten(), k[0, :, 1].flatten(), v[0, :, 1].flatten()])
    hidden = head.fc1.weight @ x
    expected = head.fc2.weight @ (hidden * torch.sigmoid(hidden))
    assert torch.allclose(found[0, :, 1], expected, atol=1e-6)


def test_loss_by_hand_and_its_gradient() -> None:
    scores = torch.tensor([[[0.0, 3.0]]])
    labels = torch.tensor([[[0.5, 0.0]]])
    by_hand = (0.5 * 0.25 + (3 - 0.5)) / 2 + 0.0025 * 9
    assert retaining_loss(scores, labels).item() == pytest.approx(by_hand)
    assert retaining_loss(scores[..., :1], labels[..., :1]).item() == pytest.approx(0.125)
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: retaining_loss(s, torch.zeros_like(s)), x)


def test_top_loss_asks_for_the_order_of_the_best() -> None:
    torch.manual_seed(0)
    labels = torch.randn(2, 3, 40, dtype=torch.float64) * 4
    assert top_loss(labels, labels, 0.0).item() == 0
    assert top_loss(labels + 7, labels, 0.0).item() == pytest.approx(0, abs=1e-12)  # level is free
    best, worst = labels.argmax(-1, keepdim=True), labels.argmin(-1, keepdim=True)
    step = torch.full_like(labels[..., :1], 2.0)
    high = top_loss(labels.scatter_add(-1, best, -step), labels, 0.0)
    low = top_loss(labels.scatter_add(-1, worst, -step), labels, 0.0)
    assert high > 3 * low > 0
    scores = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: top_loss(s, labels), scores)
    one = torch.ones(1, 1, 1)
    assert top_loss(one, one).isfinite()


def test_it_learns_which_keys_an_answer_will_need() -> None:
    """Keys along a fixed direction are the ones that answers ask for; the head must find them."""
    torch.manual_seed(0)
    head = RetainingHead(32, 1, hidden=32)
    direction = torch.randn(8)
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-3)

    def sample() -> tuple[torch.Tensor, ...]:
        q, k, v = torch.randn(4, 2, 64, 8), torch.randn(4, 1, 64, 8), torch.randn(4, 1, 64, 8)
        answer = direction + 0.1 * torch.randn(4, 2, 3, 8)
        return q, k, v, importance(answer, k)

    def overlap() -> float:
        q, k, v, labels = sample()
        best = [x.topk(6, dim=-1).indices[:, 0] for x in (head(qkv_input(q, k, v)), labels)]
        shared = [len(set(a.tolist()) & set(b.tolist())) / 6 for a, b in zip(*best, strict=True)]
        return sum(shared) / len(shared)

    q, k, v, labels = sample()
    first = retaining_loss(head(qkv_input(q, k, v)), labels).item()
    for _ in range(200):
        q, k, v, labels = sample()
        loss = retaining_loss(head(qkv_input(q, k, v)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3 * first
    assert overlap() > 0.6  # by chance: 0.09


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_starts_as_the_linear_head_exactly(activation: str, bias: bool) -> None:
    linear = RetainingHead(12, 3, hidden=0, bias=bias)
    head = RetainingHead(12, 3, hidden=9, activation=activation, bias=bias)
    head.start_from(linear)
    x = torch.randn(2, 5, 12)
    assert torch.allclose(head(x), linear(x), atol=1e-5)
    head(x).square().sum().backward()
    assert head.fc2.weight.grad[:, 6:].abs().min() > 0  # the spare units learn at once
    with pytest.raises(ValueError, match="hidden must be at least 6"):
        RetainingHead(12, 3, hidden=5).start_from(linear)
    with pytest.raises(ValueError, match="needs a linear head"):
        head.start_from(head)


def test_errors() -> None:
    with pytest.raises(ValueError, match="hidden must be at least 0, got -1"):
        RetainingHead(2, 2, hidden=-1)
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, relu, got 'x'"):
        RetainingHead(2, 2, activation="x")
