from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bitcpm_trainer_runs import SCHEDULE, trainer

from bitcpm import TwoStage
from bitcpm.qat import ternary_layers
from bitcpm.trainer import DistillationConfig, distillation_loss, zero_config


def test_two_stages_with_their_rates_and_statistics(tmp_path):
    run = trainer(tmp_path, logging_steps=1, save_strategy="no")
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert len(lines) == 20
    schedule = TwoStage(20, SCHEDULE)
    for step, line in enumerate(lines):
        expected = schedule(step).lr / SCHEDULE.lr * 5e-3
        assert line["learning_rate"] == pytest.approx(expected)
        assert ("ternary_zeros" in line) == (step >= schedule.switch_step)
    assert "ternary_flips_per_step" not in lines[10]
    for line in lines[11:]:
        assert 0.1 < line["ternary_zeros"] < 0.6
        assert 0 < line["ternary_flips_per_step"] < 0.2 and 0 < line["ternary_scale_drift"] < 0.2
    assert len(list(ternary_layers(run.model))) == 14
    assert lines[9]["loss"] < lines[0]["loss"]


def test_a_run_that_resumes_ends_like_one_that_was_not_interrupted(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    for stop in (7, 14):  # before and after the switch at 10
        run = trainer(tmp_path / "whole")
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert len(list(ternary_layers(run.model))) == 14
        for (name, a), (_, b) in zip(
            whole.model.state_dict().items(), run.model.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), f"{name} after resuming at {stop}"


@pytest.mark.parametrize("engine", ["DistributedDataParallel", "DeepSpeedEngine"])
def test_two_processes_on_cpus_train_one_model(engine, tmp_path):
    """Each sees half of what one process sees in a step, and the weights are that one's."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(__file__).parent / "bitcpm_trainer_runs.py"), str(tmp_path),
    ]  # fmt: skip
    if engine == "DeepSpeedEngine":
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        command.append("--deepspeed")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one["count"] == two["count"] == 2
    assert one["engine"] == two["engine"] == engine
    alone = trainer(tmp_path / "alone", steps=6, save_strategy="no", per_device_train_batch_size=4)
    alone.train()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(one["state"][name], two["state"][name]), name
        torch.testing.assert_close(one["state"][name], value, rtol=0, atol=5e-6)
    assert "ternary_zeros" in one["logs"][-2]
    for rank in (0, 1):  # a gloo thread that is alive at exit may abort it
        names = json.loads((tmp_path / f"threads{rank}.json").read_text())
        if names["during"] and importlib.util.find_spec("deepspeed") is None:  # it keeps the group
            assert any("gloo" in name for name in names["during"])
            assert not any("gloo" in name for name in names["after"])


def test_the_teacher_counts_from_its_step_on(tmp_path):
    teacher = trainer(tmp_path / "teacher", steps=30, save_strategy="no")
    teacher.train()
    asked = []
    teacher.model.register_forward_hook(lambda *_: asked.append(student.state.global_step))
    student = trainer(
        tmp_path / "student", save_strategy="no", teacher=teacher.model,
        distillation=DistillationConfig(begin=0.75, weight=1.0),
    )  # fmt: skip
    student.train()
    assert sorted(set(asked)) == [15, 16, 17, 18, 19]
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_distillation_loss_is_the_divergence():
    student, teacher = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, 3:] = -100
    p = (teacher.double() / 2).softmax(-1)
    q = (student.double() / 2).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    wanted = torch.cat([divergence[0, :2], divergence[1, :4]]).mean() * 4
    assert distillation_loss(student, teacher, labels, 2.0).item() == pytest.approx(wanted.item())
    assert distillation_loss(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="one vocabulary"):
        distillation_loss(student, teacher[..., :10], labels)
    for bad in (dict(begin=1.0), dict(weight=0.0), dict(temperature=0.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DistillationConfig(**bad)


def test_the_zero_configuration_ships():
    config = json.loads(zero_config().read_text())
    assert config["zero_optimization"]["stage"] == 2
    assert config["train_batch_size"] == "auto"
