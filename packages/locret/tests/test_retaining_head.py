from __future__ import annotations

import pytest
import torch

from locret import RetainingHead, importance, retaining_loss


def test_forward_is_the_formula() -> None:
    head = RetainingHead(6, 2, 4, hidden=8)
    q, k, v = torch.randn(1, 6, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    found = head(q, k, v)
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


def test_it_learns_which_keys_an_answer_will_need() -> None:
    """Keys along a fixed direction are the ones that answers ask for; the head must find them."""
    torch.manual_seed(0)
    head = RetainingHead(2, 1, 8, hidden=32)
    direction = torch.randn(8)
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-3)

    def sample() -> tuple[torch.Tensor, ...]:
        q, k, v = torch.randn(4, 2, 64, 8), torch.randn(4, 1, 64, 8), torch.randn(4, 1, 64, 8)
        answer = direction + 0.1 * torch.randn(4, 2, 3, 8)
        return q, k, v, importance(answer, k)

    def overlap() -> float:
        q, k, v, labels = sample()
        best = [x.topk(6, dim=-1).indices[:, 0] for x in (head(q, k, v), labels)]
        shared = [len(set(a.tolist()) & set(b.tolist())) / 6 for a, b in zip(*best, strict=True)]
        return sum(shared) / len(shared)

    first = retaining_loss(head(*sample()[:3]), sample()[3]).item()
    for _ in range(200):
        q, k, v, labels = sample()
        loss = retaining_loss(head(q, k, v), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3 * first
    assert overlap() > 0.6  # by chance: 0.09


def test_errors() -> None:
    with pytest.raises(ValueError, match="heads 3 is not a multiple of kv_heads 2"):
        RetainingHead(3, 2, 4)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        RetainingHead(2, 2, 4, hidden=0)
