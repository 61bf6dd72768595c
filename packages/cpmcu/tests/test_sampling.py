"""The distribution against transformers' logits processors; the draw against chi-square."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as oracle

from cpmcu.sampling import Sampling, generator, probabilities, sample


def transformers_probabilities(logits, how, previous):
    ids, scores = torch.tensor([list(previous)], dtype=torch.long), logits[None].float()
    processors = []
    if how.repetition_penalty != 1 and previous:
        processors.append(oracle.RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    processors.append(oracle.TemperatureLogitsWarper(float(how.temperature)))
    if how.top_k:
        processors.append(oracle.TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        processors.append(oracle.TopPLogitsWarper(how.top_p))
    if how.min_p:
        processors.append(oracle.MinPLogitsWarper(how.min_p))
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].softmax(0)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    size=st.sampled_from([50, 3000]),  # few, and more than are looked at first
)
def test_distribution_equals_transformers(seed, temperature, top_k, top_p, min_p, penalty, size):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * 3
    previous = torch.randint(50, (5,), generator=generator).tolist()
    how = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    ours = torch.from_numpy(probabilities(logits.numpy(), how, previous))
    torch.testing.assert_close(ours, transformers_probabilities(logits, how, previous))
    assert float(ours.sum()) == pytest.approx(1.0, abs=1e-5)


def test_draws_follow_the_distribution():
    """Pearson's chi-square of 20,000 draws stays below the 1 - 1e-6 quantile."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 0.5])
    how = Sampling(temperature=0.8, min_p=0.02)
    numbers = generator(0)
    draws = [sample(logits.numpy(), how, (), numbers) for _ in range(20_000)]
    expected = (logits.double() / 0.8).softmax(0) * len(draws)
    counts = torch.bincount(torch.tensor(draws), minlength=6).double()
    assert counts[4] == 0
    kept = expected > 0
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 33.4  # 4 degrees of freedom


def test_greedy_takes_the_largest_and_the_first_of_equals():
    logits = np.array([0.0, 3.0, 3.0, -1.0])
    assert sample(logits, Sampling(top_p=0.1)) == 1
    assert probabilities(logits, Sampling()).tolist() == [0, 1, 0, 0]


def test_greedy_honours_the_repetition_penalty():
    logits = np.array([-1.0, 2.0, 1.9])
    assert sample(logits, Sampling(repetition_penalty=1.1), previous=[1, 1]) == 2
    # a negative logit moves away from zero
    kept = np.array([-1.0, -1.05])
    assert sample(kept, Sampling(repetition_penalty=1.1), previous=[0]) == 1


def test_tiny_temperature_does_not_overflow():
    p = probabilities(np.array([500.0, 499.0, -500.0]), Sampling(temperature=1e-38))
    assert p.tolist() == [1.0, 0.0, 0.0]


def test_input_is_not_changed():
    logits = np.random.default_rng(0).normal(size=9).astype(np.float32)
    before = logits.copy()
    how = Sampling(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2)
    probabilities(logits, how, [1, 2])
    assert np.array_equal(logits, before)
