"""Killed or not, a run ends with the same weights; and it learns."""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm4 import TrainConfig, train
from minicpm4.data import TokenData, pack
from minicpm4.presets import tiny
from minicpm4.schedule import WSD
from minicpm4.tokenizer import train_bpe
from minicpm4.trainer import load_weights, parameter_groups

CONFIG = TrainConfig(
    batch_size=4, length=32, eval_every=5, eval_windows=8, checkpoint_seconds=1e9, seed=3
)
SCHEDULE = WSD(0.02, 20, 2, 0.3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own documentation, packed: real text that every machine has."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_bpe(texts, 512)
    pack(texts[8:], tokenizer, folder / "train")
    pack(texts[:8], tokenizer, folder / "validation")
    return folder


def run(corpus: Path, out: Path, **options: Any) -> Any:
    """Train a tiny model in this process; returns the model and the result."""
    model = options.pop("model", None) or tiny(vocab_size=512)
    schedule = options.pop("schedule", SCHEDULE)
    result = train(
        model,
        TokenData(corpus / "train"),
        TokenData(corpus / "validation"),
        schedule,
        options.pop("steps", schedule.total_steps),
        options.pop("config", CONFIG),
        out,
        **options,
    )
    return model, result


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# A run in a process of its own, slow enough to be hit in the middle of a step.
VICTIM = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    import torch
    from minicpm4 import TrainConfig, WSD, train
    from minicpm4.data import TokenData
    from minicpm4.presets import tiny
    torch.set_num_threads(int(sys.argv[3]))
    corpus, out = Path(sys.argv[1]), Path(sys.argv[2])
    def on_step(step, loss):
        print(step, flush=True)
        time.sleep(0.03)
    train(
        tiny(vocab_size=512), TokenData(corpus / "train"), TokenData(corpus / "validation"),
        WSD(0.02, 40, 2, 0.3), 40,
        TrainConfig(batch_size=4, length=32, eval_every=5, eval_windows=8,
                    checkpoint_seconds=0.05, seed=3),
        out, on_step=on_step,
    )
""")


def test_a_killed_process_and_the_same_run_again_end_bit_for_bit_equal(
    corpus: Path, tmp_path: Path
) -> None:
    out, schedule = tmp_path / "victim", WSD(0.02, 40, 2, 0.3)
    for at in (9, 21):
        command = [sys.executable, "-c", VICTIM, corpus, out, torch.get_num_threads()]
        victim = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, text=True
        )
        seen = []
        for line in victim.stdout:
            seen.append(int(line))
            if seen[-1] >= at:
                time.sleep(0.011)  # into the pause, the next step, or the writing of a checkpoint
                victim.send_signal(signal.SIGKILL)
                break
        assert victim.wait(timeout=60) == -signal.SIGKILL
        assert at == 9 or seen[0] > 1, "the second run began again instead of resuming"
        assert 1 <= len(list(out.glob("checkpoint-*"))) <= 2
    steps: list[int] = []
    resumed, result = run(
        corpus, out, schedule=schedule, on_step=lambda step, loss: steps.append(step)
    )
    assert 1 < steps[0] <= 40 and steps[-1] == 40
    whole, wanted = run(corpus, tmp_path / "whole", schedule=schedule)
    assert same_weights(resumed, whole)
    assert result.log.read_text() == wanted.log.read_text()
    assert result.log.read_text().count("\n") == 40
    assert result.validation == wanted.validation
    assert not list(out.glob(".*partial"))


def test_ctrl_c_waits_for_the_step_to_be_whole(corpus: Path, tmp_path: Path) -> None:
    """The worst moment: weights are updated, the step is not yet counted."""
    before = signal.getsignal(signal.SIGINT)
    wanted, _ = run(corpus, tmp_path / "whole")
    original, calls = torch.optim.AdamW.step, []

    def step(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "cut")
    assert [p.name for p in tmp_path.glob("cut/checkpoint-*")] == ["checkpoint-00000007"]
    assert signal.getsignal(signal.SIGINT) == before
    got, _ = run(corpus, tmp_path / "cut")
    assert same_weights(got, wanted)
    assert (tmp_path / "cut/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()


def test_an_interrupt_from_the_callback_and_other_threads(corpus: Path, tmp_path: Path) -> None:
    def stop(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    wanted, _ = run(corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "cut", on_step=stop)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(run(corpus, tmp_path / "cut")))
    thread.start()
    thread.join()
    assert same_weights(got[0], wanted)


def test_it_learns_more_than_how_often_each_token_comes(corpus: Path, tmp_path: Path) -> None:
    data = TokenData(corpus / "train")
    counts = Counter(data.tokens.tolist())
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    config = replace(CONFIG, batch_size=8, length=64, eval_every=30)
    _, result = run(corpus, tmp_path, schedule=WSD(0.02, 90, 5, 0.3), config=config)
    losses = [point["loss"] for point in result.validation]
    assert [point["step"] for point in result.validation] == [30, 60, 90]
    assert losses[0] > losses[1] > losses[2] and losses[2] < unigram - 0.5
    validation = TokenData(corpus / "validation")
    per_token = validation.bytes / len(validation)
    assert result.validation[2]["per_byte"] == pytest.approx(losses[2] / per_token)
    assert result.tokens_per_second > 0
    rows = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 91))
    assert rows[0]["loss"] > rows[-1]["loss"] and rows[4]["lr"] == 0.02


def test_accumulation_equals_one_large_batch(corpus: Path, tmp_path: Path) -> None:
    large, _ = run(corpus, tmp_path / "a", config=replace(CONFIG, batch_size=8), steps=1)
    small, _ = run(
        corpus, tmp_path / "b", config=replace(CONFIG, batch_size=2, accumulation=4), steps=1
    )
    rows = [json.loads((tmp_path / x / "log.jsonl").read_text()) for x in "ab"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)
    # Adam's first step is lr * sign(g) wherever g is not tiny.
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        assert ((a - b).abs() > 1e-4).float().mean() < 0.01


def test_matrices_of_the_layers_learn_at_the_rate_over_the_width_ratio() -> None:
    for tied in (True, False):
        model = tiny(tie_word_embeddings=tied)  # width ratio 96 / 48
        names = {id(p): name for name, p in model.named_parameters()}
        found = {}
        for group in parameter_groups(model, 0.1):
            for p in group["params"]:
                found[names[id(p)]] = (group["lr_scale"], group["weight_decay"])
        assert found.keys() == set(names.values())
        for name, rate in found.items():
            if "norm" in name:
                assert rate == (1.0, 0.0)
            else:
                assert rate == ((0.5 if "_proj" in name else 1.0), 0.1), name


def test_a_step_is_adamw_by_hand(corpus: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, clip=0.5)
    model, before = tiny(vocab_size=512).train(), tiny(vocab_size=512)
    window = torch.from_numpy(TokenData(corpus / "train").batch(3, 0, 4, 32))
    logits = model(window[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in model.parameters()))
    assert norm > 0.5
    trained, result = run(corpus, tmp_path, config=config, steps=1)
    row = json.loads(result.log.read_text())
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5) and row["lr"] == 0.01
    for (name, p), old, new in zip(
        model.named_parameters(), before.parameters(), trained.parameters(), strict=True
    ):
        gradient = p.grad * 0.5 / (norm + 1e-6)
        lr = 0.01 * (0.5 if "_proj" in name else 1.0)
        decayed = old * (1 - lr * (0.0 if "norm" in name else 0.1))
        wanted = decayed - lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(new, wanted, atol=2e-5, rtol=0, msg=name)


def test_a_branch_goes_on_from_the_middle(corpus: Path, tmp_path: Path) -> None:
    trunk, _ = run(corpus, tmp_path / "trunk", branch_at=10)
    branch = tiny(seed=9, vocab_size=512)
    load_weights(branch, tmp_path / "trunk" / "branch.safetensors")
    half, _ = run(corpus, tmp_path / "half", steps=10)
    assert same_weights(branch, half) and not same_weights(branch, trunk)
    _, result = run(corpus, tmp_path / "branch", model=branch, first_step=10)
    rows = [json.loads(line)["step"] for line in result.log.read_text().splitlines()]
    assert rows == list(range(11, 21))


def test_what_goes_wrong_is_said(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TrainConfig(batch_size=0)
    run(corpus, tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match="holds a run with seed=3, now it is 4"):
        run(corpus, tmp_path / "run", config=replace(CONFIG, seed=4))
    with pytest.raises(ValueError, match="embed_tokens.weight has shape"):
        run(corpus, tmp_path / "run", model=tiny(vocab_size=300))
    with pytest.raises(ValueError, match="holds another model: .*layers.2"):
        run(corpus, tmp_path / "run", model=tiny(vocab_size=512, num_hidden_layers=3))
    with pytest.raises(FileNotFoundError, match="none does not exist: expected a safetensors"):
        load_weights(tiny(), tmp_path / "none")
    run(corpus, tmp_path / "run", config=replace(CONFIG, checkpoint_seconds=1.0))

    broken = tiny(vocab_size=512)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"the loss is nan at step 1 .*: lower lr, lengthen the"):
        run(corpus, tmp_path / "nan", model=broken)
    assert not list((tmp_path / "nan").glob("checkpoint-*"))


def test_a_gradient_that_overflows_never_reaches_the_weights(corpus: Path, tmp_path: Path) -> None:
    model = tiny(vocab_size=512)
    before = [p.clone() for p in model.parameters()]
    model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ValueError, match="the gradient norm is (nan|inf) at step 1"):
        run(corpus, tmp_path, model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bf16_autocast_trains_and_keeps_fp32_weights(corpus: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, bf16=True)
    full, exact = run(corpus, tmp_path / "fp32")
    half, result = run(corpus, tmp_path / "bf16", config=config)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not same_weights(full, half)
    assert result.validation[-1]["loss"] == pytest.approx(exact.validation[-1]["loss"], rel=0.02)
