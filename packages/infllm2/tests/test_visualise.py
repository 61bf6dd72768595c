from __future__ import annotations

import numpy as np
import pytest
import torch

from infllm2 import InfLLMv2Config, select_blocks
from infllm2.visualise import plot_visited, visited_map


def test_map_is_the_share_of_queries_and_heads_that_visit(small: InfLLMv2Config) -> None:
    S, T = 150, 90
    q, k = torch.randn(1, 6, T, 8), torch.randn(1, 2, S, 8)
    blocks = select_blocks(q, k, small)
    got = visited_map(blocks, T, S, 16)
    assert got.shape == (10, 10)
    for a in range(10):
        rows = [i for i in range(T) if (S - T + i) // 16 == a]
        for b in range(10):
            if b > a or not rows:
                assert np.isnan(got[a, b])
                continue
            hits = sum(int((blocks[0, h, i] == b).any()) for h in range(2) for i in rows)
            assert got[a, b] == pytest.approx(hits / (2 * len(rows)))
    assert (np.diag(got)[4:] == 1).all() and (got[4:, 0] == 1).all()


def test_map_takes_the_blocks_of_a_trace() -> None:
    blocks = torch.tensor([[[0, -1], [0, 1]]], dtype=torch.int32)
    np.testing.assert_array_equal(visited_map(blocks, 2, 2, 1), [[1, np.nan], [1, 1]])


def test_map_refuses_what_does_not_fit() -> None:
    blocks = torch.tensor([[[0, -1], [0, 1]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="with T=3 queries of S=3"):
        visited_map(blocks, 3, 3, 1)
    with pytest.raises(ValueError, match="names block 1, but 2 keys make 1 blocks of 2"):
        visited_map(blocks, 2, 2, 2)


def test_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    share = np.array([[1.0, np.nan], [0.5, 1.0]])
    figure = plot_visited(share, 64, title="layer 3", needle=70)
    axes = figure.axes[0]
    assert axes.get_title() == "layer 3"
    assert axes.get_xlim() == (0, 128) and axes.get_ylim() == (128, 0)
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), share)
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
