"""Sliding windows on the CPU, against the reference (test_reference.py: it is transformers)."""

import pytest
import torch

from cpmcu import Engine, cpu_library

pytestmark = pytest.mark.skipif(cpu_library.kernels()[0] is None, reason="no kernels")


def ids_of(n, seed=0):
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def engines(folder, dtype="float32", **options):
    """The native engine and the reference."""
    return [
        Engine.from_pretrained(folder, dtype=dtype, backend=backend, **options)
        for backend in ("cpu", "reference")
    ]


# Within a tile of 64 keys, at its end, over several; one key alone; more than the prompt.
@pytest.mark.parametrize("window", [1, 9, 64, 65, 150, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_prompts_and_tokens(tiny_folder, window, heads):
    options = {"sliding_window": window, "num_attention_heads": heads[0]}
    _, folder = tiny_folder("mistral", num_key_value_heads=heads[1], head_dim=32, **options)
    ours, plain = engines(folder)
    ids = ids_of(333)
    exact = plain.logits(ids)
    torch.testing.assert_close(ours.logits(ids), exact, atol=2e-5, rtol=1e-5)
    ours.reset()
    for first, last in ((0, 70), (70, 71), (71, 201)):  # in pieces, before and beyond the window
        torch.testing.assert_close(
            ours.prefill(ids[first:last]), exact[last - 1], atol=2e-5, rtol=1e-5
        )
    for at in range(201, 280):
        torch.testing.assert_close(ours.decode(ids[at]), exact[at], atol=2e-5, rtol=1e-5)
    ours.rollback(75)
    torch.testing.assert_close(ours.decode(ids[75]), exact[75], atol=2e-5, rtol=1e-5)


def test_a_key_that_left_the_window_does_not_count(tiny_folder):
    """Of one layer: behind the window other tokens change nothing, within it they do."""
    _, folder = tiny_folder("mistral", sliding_window=40, num_hidden_layers=1)
    ours, _ = engines(folder)
    ids = ids_of(200)
    behind, within = list(ids), list(ids)
    behind[100] += 1 if behind[100] < 255 else -1
    within[160] += 1 if within[160] < 255 else -1
    first = ours.logits(ids)[199]
    assert torch.equal(ours.logits(behind)[199], first)
    assert not torch.equal(ours.logits(within)[199], first)


@pytest.mark.parametrize("window", [9, 100])
def test_bfloat16_and_caches_of_eight_bits(tiny_folder, window):
    _, folder = tiny_folder("mistral", sliding_window=window, head_dim=64)
    ids = ids_of(250)
    exact = engines(folder)[1].logits(ids)
    ours, plain = (engine.logits(ids) for engine in engines(folder, "bfloat16"))
    assert (ours - exact).norm() < 2 * (plain - exact).norm()
    for dtype in ("float32", "bfloat16"):
        ours, plain = engines(folder, dtype, kv="int8")
        wanted = plain.logits(ids)
        error = (wanted - exact).norm()  # of eight bits
        assert (ours.logits(ids) - exact).norm() < 1.5 * error
        ours.reset()
        steps = [ours.prefill(ids[:100]), *(ours.decode(i) for i in ids[100:])]
        assert (torch.stack(steps) - exact[99:]).norm() < 1.5 * error


def test_threads_do_not_change_bits(tiny_folder):
    _, folder = tiny_folder("mistral", sliding_window=100)
    ids = ids_of(400)
    found = [Engine.from_pretrained(folder, threads=n, backend="cpu").logits(ids) for n in (1, 2)]
    assert torch.equal(*found)
