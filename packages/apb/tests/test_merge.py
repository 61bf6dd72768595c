from __future__ import annotations

import pytest
import torch

from apb import merge_lse


def _partials(logits: torch.Tensor, values: torch.Tensor, cuts: list[int]):
    """Each piece's own softmax by the textbook, NaN and -inf for an empty piece."""
    outs, lses = [], []
    for a, b in zip(cuts, cuts[1:], strict=False):
        piece = logits[:, a:b]
        lse = piece.logsumexp(-1)
        outs.append(
            torch.exp(piece - lse[:, None]) @ values[a:b]
            if b > a
            else values[:0].mean(0).expand(logits.shape[0], -1)
        )
        lses.append(lse)
    return outs, lses


@pytest.mark.parametrize("cuts", [[0, 40], [0, 1, 40], [0, 0, 13, 13, 27, 40, 40], [0, 39, 40]])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_equals_softmax_over_the_concatenation(cuts: list[int], offset: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 40, dtype=torch.float64) * 5 + offset
    values = torch.randn(40, 3, dtype=torch.float64)
    outs, lses = _partials(logits, values, cuts)
    out, lse = merge_lse(outs, lses)
    torch.testing.assert_close(out, logits.softmax(-1) @ values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-12, atol=0)


def test_hosts_far_apart_in_float32() -> None:
    outs = [torch.full((2, 4), value) for value in (1.0, 2.0, 3.0)]
    lses = [torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])]
    out, lse = merge_lse(outs, lses)
    # Row 0 is all host 1's; row 1 is hosts 0 and 2 in equal parts, log 2 above either.
    torch.testing.assert_close(out, torch.tensor([[2.0] * 4, [2.0] * 4]))
    torch.testing.assert_close(lse, torch.tensor([1e4, 1e4 + 0.6931472]))


def test_a_host_without_keys_adds_nothing_even_with_nan() -> None:
    out, lse = torch.randn(3, 2), torch.randn(3)
    empty = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    merged, merged_lse = merge_lse([empty[0], out, empty[0]], [empty[1], lse, empty[1]])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)
    nothing, nothing_lse = merge_lse([empty[0]], [empty[1]])
    assert (nothing == 0).all() and (nothing_lse == -torch.inf).all()


def test_merges_of_merges() -> None:
    outs, lses = list(torch.randn(4, 5, 3)), list(torch.randn(4, 5) * 10)
    left, right = merge_lse(outs[:2], lses[:2]), merge_lse(outs[2:], lses[2:])
    twice = merge_lse([left[0], right[0]], [left[1], right[1]])
    torch.testing.assert_close(twice, merge_lse(outs, lses))


def test_bfloat16_is_merged_in_float32() -> None:
    out, lse = merge_lse([torch.ones(1, 2).bfloat16()] * 2, [torch.zeros(1).bfloat16()] * 2)
    assert out.dtype == lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "one tensor each for every host, got 0 and 0"),
        ([torch.ones(2, 3)], [], "got 1 and 0"),
        ([torch.ones(2, 3)], [torch.ones(2, 1)], r"outs\[0\] is \(2, 3\) with lses\[0\] \(2, 1\)"),
        ([torch.ones(2, 3), torch.ones(1, 3)], [torch.ones(2), torch.ones(1)], r"outs\[1\]"),
    ],
)
def test_errors(outs: list, lses: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_lse(outs, lses)
