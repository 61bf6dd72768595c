"""QAT learns: real text, a small model, ten seconds."""

from __future__ import annotations

import pydoc_data.topics

import torch

from bitcpm import (
    TernaryConfig,
    TwoStage,
    TwoStageConfig,
    materialise,
    quantisation_stats,
    ternarize,
)
from bitcpm.recover import on_grid


def test_two_stage_training_on_real_text_lowers_the_loss(tiny):
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    data = torch.tensor(list(text))
    held_out = data[-8 * 129 :].view(8, 129)
    random = torch.Generator().manual_seed(0)
    model = tiny("llama-gqa3", vocab_size=256, hidden_size=96, intermediate_size=192).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = TwoStage(150, TwoStageConfig(warmup_steps=10, rewarmup_steps=10))

    @torch.no_grad()
    def evaluate() -> float:
        return model(held_out, labels=held_out).loss.item()

    losses = {}
    for step in range(150):
        phase, lr, _ = schedule(step)
        if step == schedule.switch_step:
            losses["full precision"] = evaluate()
            ternarize(model, TernaryConfig(group_size=32))
            losses["at the switch"] = evaluate()
            quantisation_stats(model)
        for group in optimiser.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(data) - 8 * 129 - 65, (16,), generator=random)
        batch = torch.stack([data[s : s + 64] for s in starts])
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    stats = quantisation_stats(model)
    losses["end"] = evaluate()
    # Bytes of English text: log 256 = 5.5 untrained, about 3.1 from byte frequencies alone.
    assert losses["full precision"] < 3.1
    assert losses["at the switch"] > losses["full precision"] + 0.03
    assert losses["end"] < losses["at the switch"] - 0.1 and losses["end"] < 3.0
    assert all(0.001 < s.flip_share < 0.9 for s in stats.values())
    weight = materialise(model).model.layers[1].mlp.down_proj.weight.detach()
    assert on_grid(weight, 32).all()
    assert evaluate() == losses["end"]
