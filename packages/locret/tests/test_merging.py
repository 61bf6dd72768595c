from __future__ import annotations

from dataclasses import replace

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import LocretConfig, prefill  # noqa: E402
from locret.attention import attend  # noqa: E402
from locret.merging import merged  # noqa: E402


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_closed_form() -> None:
    """Each evicted entry by itself, in plain Python."""
    keys, values = random(2, 3, 9, 4), random(2, 3, 9, 5, seed=1)
    masses = random(2, 3, 9, seed=2).abs() + 0.5
    valid = torch.ones(2, 3, 9, dtype=torch.bool)
    valid[0, :, 7:] = False
    index = torch.stack([torch.randperm(7)[:4].sort().values for _ in range(6)]).view(2, 3, 4)
    left = torch.ones(2, 3, 4, dtype=torch.bool)
    left[1, 2, 3] = False
    got, mass, changed = merged(keys, values, masses, index, left, valid, 0.2)
    moved = 0
    for b in range(2):
        for j in range(3):
            stay = index[b, j][left[b, j]].tolist()
            sums = {i: [masses[b, j, i], masses[b, j, i] * values[b, j, i]] for i in stay}
            for e in range(9):
                if e in stay or not valid[b, j, e]:
                    continue
                near = torch.cosine_similarity(keys[b, j, stay], keys[b, j, e][None], dim=-1)
                if near.max() >= 0.2:
                    moved += 1
                    target = sums[stay[int(near.argmax())]]
                    target[0] = target[0] + masses[b, j, e]
                    target[1] = target[1] + masses[b, j, e] * values[b, j, e]
            for at, i in enumerate(stay):
                m, total = sums[i]
                assert mass[b, j, at] == pytest.approx(float(m), rel=1e-5)
                assert (got[b, j, at] - total / m).abs().max() < 1e-5
                assert bool(changed[b, j, at]) == (float(m) != float(masses[b, j, i]))
    assert moved > 5


@pytest.mark.parametrize("new", [1, 3])
def test_equal_keys_merge_without_loss(new: int) -> None:
    """Attention over what is left is attention over all, where evicted keys are copies."""
    few = random(1, 2, 4, 8)
    old = few[:, :, torch.tensor([0, 1, 2, 3, 1, 1, 3, 0])]
    values, masses = random(1, 2, 8, 8, seed=1), torch.ones(1, 2, 8)
    index = torch.arange(4).expand(1, 2, 4)
    got, mass, _ = merged(old, values, masses, index, None, None, 0.99)
    assert mass[0, 0].tolist() == [2, 3, 1, 2]
    q, k, v = (random(1, h, new, 8, seed=s) for h, s in ((6, 2), (2, 3), (2, 4)))
    join = lambda a, b: torch.cat([a, b], 2)  # noqa: E731
    whole = attend(q, join(old, k), join(values, v), None, 0.3)
    less = attend(q, join(few, k), join(got, v), None, 0.3, mass.log())
    without = attend(q, join(few, k), join(got, v), None, 0.3)
    assert (whole - less).abs().max() < 1e-5 < (whole - without).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
@pytest.mark.parametrize("budgets", ["uniform", "head", "layer"])
def test_masses_add_up_to_what_was_read(storage: str, budgets: str) -> None:
    model = testbed.tiny("llama-gqa3")
    ids = torch.randint(5, 250, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    config = LocretConfig(
        budget=16, chunk=8, stabilisers=4, local=0, sinks=2, merge=-1.0, storage=storage,
        budgets=budgets,
    )  # fmt: skip
    cache = prefill(model, "keynorm", ids, config, mask)
    for layer in cache.layers:
        mass = layer.masses
        if layer.valid is not None:
            mass = mass * layer.valid
        assert mass.sum(-1).round().int().tolist() == [[60, 60], [49, 49]]  # nothing is lost
    none = prefill(model, "keynorm", ids, replace(config, merge=1.0), mask)
    for layer in none.layers:  # random keys are not parallel
        assert (layer.masses if layer.valid is None else layer.masses[layer.valid]).eq(1).all()
    with pytest.raises(ValueError, match="merge is a cosine"):
        replace(config, merge=1.5)
