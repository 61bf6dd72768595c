"""SparseCache after all that generation does to it: decoding chooses what a prefill would."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

from infllm2 import InfLLMv2Config, LayerCache, infllmv2_attention, select_blocks
from infllm2.selection import blocks_of

pytest.importorskip("transformers")

from infllm2.cache import SparseCache  # noqa: E402 - needs transformers

CONFIG = InfLLMv2Config(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=2, dense_len=-1
)
LAYERS, HEADS = 2, 2


class AnySequence(RuleBasedStateMachine):
    """The tokens that should be left are kept beside, as plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.cache = SparseCache(CONFIG)
        self.rows = 2
        self.held = [[torch.zeros(2, HEADS, 0, 8) for _ in range(2)] for _ in range(LAYERS)]
        self.append(90)

    def _random(self, heads: int, n: int) -> Tensor:
        return torch.randn(self.rows, heads, n, 8, generator=self.generator)

    @rule(n=st.sampled_from([1, 1, 3, 16, 70]))
    def append(self, n: int) -> None:
        """A step of generation: every layer gets n tokens, and attends."""
        for layer, tensors in enumerate(self.held):
            new = [self._random(HEADS, n) for _ in range(2)]
            tensors[:] = [torch.cat([x, y], 2) for x, y in zip(tensors, new, strict=True)]
            k, v = self.cache.update(*new, layer)
            assert torch.equal(k, tensors[0]) and torch.equal(v, tensors[1])
            q = self._random(3 * HEADS, n)
            known = k.infllm2_cache.compressed()
            for backend in ("auto", "torch", "reference"):
                got = blocks_of(q, k, CONFIG, keys=known, backend=backend)
                assert torch.equal(got, select_blocks(q, tensors[0], CONFIG, backend=backend))
        assert self.cache.get_seq_length() == self.held[0][0].shape[2]

    @rule(n=st.sampled_from([0, 1, 4, 30]))
    def crop(self, n: int) -> None:
        n = min(n, self.held[0][0].shape[2])
        self.cache.crop(-n)
        self._all(lambda x: x[:, :, : x.shape[2] - n])

    @rule(rows=st.lists(st.integers(0, 99), min_size=4, max_size=4))
    def reorder(self, rows: list[int]) -> None:
        chosen = torch.tensor([row % self.rows for row in rows[: self.rows]])
        self.cache.reorder_cache(chosen)
        self._all(lambda x: x[chosen])

    @precondition(lambda self: self.rows <= 2)
    @rule(repeats=st.sampled_from([1, 2]))
    def repeat(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.rows *= repeats
        self._all(lambda x: x.repeat_interleave(repeats, 0))

    @rule(rows=st.lists(st.integers(-99, 99), min_size=1, max_size=3))
    def select(self, rows: list[int]) -> None:
        chosen = torch.tensor([row % self.rows - self.rows * (row < 0) for row in rows])
        self.cache.batch_select_indices(chosen)
        self.rows = len(rows)
        self._all(lambda x: x[chosen])

    @rule(pickled=st.booleans())
    def copied(self, pickled: bool) -> None:
        """A copy goes on, and the original does not notice."""
        other = self.cache
        self.cache = pickle.loads(pickle.dumps(other)) if pickled else copy.deepcopy(other)
        other.crop(-3)
        other.update(*(self._random(HEADS, 5) for _ in range(2)), 0)

    def _all(self, change) -> None:
        self.held = [[change(x) for x in tensors] for tensors in self.held]


AnySequence.TestCase.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
TestAnySequence = AnySequence.TestCase


@pytest.mark.parametrize("first", ["inference", "no_grad"])
def test_a_cache_outlives_the_mode_it_was_made_in(first: str) -> None:
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    second = "no_grad" if first == "inference" else "inference"
    q, k, v = (torch.randn(1, h, 220, 8) for h in (6, 2, 2))
    cache = LayerCache(CONFIG)
    outs = []
    for mode, part in ((first, slice(0, 200)), (second, slice(200, 201)), (first, slice(201, 220))):
        with modes[mode]():
            outs.append(
                infllmv2_attention(q[:, :, part], k[:, :, part], v[:, :, part], CONFIG, cache=cache)
            )
            cache.reorder(torch.tensor([0]))
    outs = torch.cat([out.clone() for out in outs], 2)
    torch.testing.assert_close(outs, infllmv2_attention(q, k, v, CONFIG), rtol=0, atol=1e-5)


def test_saved_and_loaded() -> None:
    cache = SparseCache(CONFIG)
    k = torch.randn(1, 2, 150, 8)
    cache.update(k, k, 0)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.layers[0].keys, k) and again.config == CONFIG
    again.update(k[:, :, :1], k[:, :, :1], 0)
    assert (cache.get_seq_length(), again.get_seq_length()) == (150, 151)


def test_gradients_stop_with_an_error_not_in_silence() -> None:
    k = torch.randn(1, 2, 150, 8, requires_grad=True)
    for held in (LayerCache(CONFIG), SparseCache(CONFIG)):
        keys, values = held.update(k, k) if isinstance(held, LayerCache) else held.update(k, k, 0)
        assert torch.equal(keys, k)
        out = infllmv2_attention(torch.randn(1, 6, 9, 8), keys, values, CONFIG)
        with pytest.raises(RuntimeError, match="no gradient flows through an infllm2 cache"):
            out.sum().backward()
    copy.deepcopy(held)  # as those that hold no graph can be
    assert k.grad is None


def test_one_layer_of_a_sparse_cache_serves_as_a_cache() -> None:
    q, k, v = (torch.randn(1, h, 200, 8) for h in (6, 2, 2))
    cache = SparseCache(CONFIG)
    cache.update(k[:, :, :150], v[:, :, :150], 0)
    rest = slice(150, 200)
    got = infllmv2_attention(
        q[:, :, rest], k[:, :, rest], v[:, :, rest], CONFIG, cache=cache.layers[0]
    )
    assert torch.equal(got, infllmv2_attention(q[:, :, rest], k, v, CONFIG))
    assert cache.get_seq_length() == 200 and torch.equal(cache.layers[0].keys, k)
