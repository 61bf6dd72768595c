"""The runner: done is skipped, changed is rerun, killed is resumed, broken leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minicpm4.pipeline import config as pipeline_config
from minicpm4.pipeline import stage as stage_module
from minicpm4.pipeline.config import load_pipeline
from minicpm4.pipeline.runner import Runner

# Two real stages: `count` writes numbers one by one (resumable), `total` adds them up.
STAGES_SOURCE = """
import json, os, signal
from pathlib import Path
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig

class CountConfig(StageConfig):
    numbers: int = 3
    kill_after: int = -1

class TotalConfig(StageConfig):
    fail: bool = False

def count(config, inputs, space):
    log = space.path / "log.txt"
    done = log.read_text().split() if log.exists() else []
    for number in range(len(done), config.numbers):
        if number == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as stream:
            stream.write(f"{number}\\n")
    with open(os.environ["CALLS"], "a") as stream:
        stream.write(f"count {len(done)}\\n")
    space.write_metrics({"numbers": config.numbers})

def total(config, inputs, space):
    (space.path / "half.txt").write_text("half")
    if config.fail:
        raise ValueError("the numbers do not add up: give other numbers")
    with open(os.environ["CALLS"], "a") as stream:
        stream.write("total\\n")
    numbers = [int(n) for n in inputs["log"].read_text().split()]
    (space.path / "total.json").write_text(json.dumps(sum(numbers)))

def nothing(config, inputs):
    return Estimate(1, 1, 1)

COUNT_MAKES = {"log": "log.txt", "metrics": "metrics.json"}
COUNT = Stage("count", "", CountConfig, count, nothing, {}, COUNT_MAKES, ())
TOTAL_MAKES = {"total": "total.json"}
TOTAL = Stage("total", "", TotalConfig, total, nothing, {"log": "count.log"}, TOTAL_MAKES, ())
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register the two stages, and count their calls in a file."""
    for name in ("count", "total"):
        module = tmp_path / "modules" / f"demo_{name}.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(STAGES_SOURCE + f"\nSTAGE = {name.upper()}\n")
        monkeypatch.setitem(stage_module.STAGES, name, f"demo_{name}")
        sys.modules.pop(f"demo_{name}", None)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").touch()
    return tmp_path


def pipeline_file(folder: Path, text: str) -> str:
    path = folder / "demo.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


DEMO = """
    name: demo
    stages:
      count: {numbers: 4}
      total:
"""


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split("\n")[:-1]


def run(folder: Path, text: str = DEMO, **options: str) -> Path:
    out = folder / "run"
    Runner(load_pipeline(pipeline_file(folder, text)), out).run(**options)
    return out


def test_runs_then_skips(stages: Path) -> None:
    out = run(stages)
    assert json.loads((out / "total" / "total.json").read_text()) == 6
    assert calls(stages) == ["count 0", "total"]
    run(stages)
    assert calls(stages) == ["count 0", "total"]


def test_a_changed_key_reruns_its_stage_and_what_depends_on_it(stages: Path) -> None:
    run(stages)
    out = run(stages, DEMO.replace("numbers: 4", "numbers: 5"))
    assert calls(stages) == ["count 0", "total", "count 0", "total"]
    assert json.loads((out / "total" / "total.json").read_text()) == 10


def test_equal_output_of_a_rerun_stage_does_not_rerun_the_next(stages: Path) -> None:
    run(stages)
    # Another key, the same numbers: `count` runs again, `total` sees equal inputs.
    run(stages, DEMO.replace("numbers: 4", "numbers: 4, kill_after: 7"))
    assert calls(stages) == ["count 0", "total", "count 0"]


def test_an_altered_output_is_noticed(stages: Path) -> None:
    out = run(stages)
    (out / "count" / "log.txt").write_text("99\n")
    run(stages)
    assert calls(stages) == ["count 0", "total", "count 0"]
    assert (out / "count" / "log.txt").read_text() == "0\n1\n2\n3\n"


def test_from_and_only(stages: Path) -> None:
    run(stages)
    run(stages, only="total")
    run(stages, start="total")
    run(stages, start="count")
    assert calls(stages) == ["count 0", "total", "total", "total", "count 0", "total"]


def test_only_without_its_inputs_says_what_to_run(stages: Path) -> None:
    with pytest.raises(ValueError, match=r"'total' comes after count.*run the whole pipeline"):
        run(stages, only="total")
    assert not (stages / "run").exists()


def test_unknown_stage_lists_the_known(stages: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown stage 'totl'.*count, total"):
        run(stages, start="totl")


def test_killed_run_resumes_with_the_same_result(stages: Path) -> None:
    path = pipeline_file(stages, DEMO)
    program = textwrap.dedent(f"""
        from pathlib import Path
        from minicpm4.pipeline import stage
        stage.STAGES.update(count="demo_count", total="demo_total")
        from minicpm4.pipeline.config import load_pipeline
        from minicpm4.pipeline.runner import Runner
        Runner(load_pipeline({path!r}), Path({str(stages / "run")!r})).run()
    """)
    environment = {**os.environ, "PYTHONPATH": str(stages / "modules"), "KILL_AT": "2"}
    killed = subprocess.run([sys.executable, "-c", program], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert (stages / "run" / "count.work").is_dir()
    assert not (stages / "run" / "count").exists()
    states = Runner(load_pipeline(path), stages / "run").states()
    assert [state.action for _, state in states] == ["resume", "run"]
    out = run(stages)
    assert calls(stages) == ["count 2", "total"]
    assert json.loads((out / "total" / "total.json").read_text()) == 6
    assert not (out / "count.work").exists()


def test_killed_work_of_another_configuration_is_not_resumed(stages: Path) -> None:
    work = stages / "run" / "count.work"
    work.mkdir(parents=True)
    (work / "log.txt").write_text("7\n7\n")
    (work / "fingerprint.json").write_text("{}")
    out = run(stages)
    assert (out / "count" / "log.txt").read_text() == "0\n1\n2\n3\n"


def test_a_user_error_keeps_finished_stages_and_leaves_nothing_half_written(stages: Path) -> None:
    text = DEMO.replace("total:", "total: {fail: true}")
    with pytest.raises(ValueError, match=r"stage 'total': the numbers do not add up.*minicpm4 run"):
        run(stages, text)
    assert sorted(p.name for p in (stages / "run").iterdir()) == [".lock", "count"]


def test_a_run_folder_serves_one_run_at_a_time(stages: Path) -> None:
    runner = Runner(load_pipeline(pipeline_file(stages, DEMO)), stages / "run")
    with runner._lock(), pytest.raises(ValueError, match="in use by another run"):
        run(stages)


def test_no_disk_space_is_said_before_anything_is_made(
    stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs about 0 MB in .*0 MB are free"):
        run(stages)
    assert not (stages / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("just text", "expected keys 'name' and 'stages'"),
        ("name: x\nstages: {}", "stages: Dictionary should have at least 1 item"),
        ("name: x\nstage: {}", r"'stages' is missing|unknown key 'stage'"),
        ("name: a/b\nstages: {count: }", "name: String should match pattern"),
        ("name: x\nstages: {cuont: }", r"unknown stage 'cuont' \(did you mean 'count'\?\)"),
        (
            "name: x\nstages: {count: {number: 3}}",
            r"unknown key 'stages.count.number' \(did you mean 'numbers'\?\)",
        ),
        ("name: x\nstages: {count: {numbers: many}}", r"stages.count.numbers: .*integer.*'many'"),
        ("name: x\nstages: {total: }", r"total.inputs.log: no earlier stage 'count'"),
        (
            "name: x\nstages: {count: , total: {inputs: {log: count.lgo}}}",
            "has no artefact 'lgo'; it makes log, metrics",
        ),
        ("name: x\nstages: {count: , total: {inputs: {lgo: ./a}}}", "inputs.lgo: unknown input"),
    ],
)
def test_mistakes_in_the_file_are_named(stages: Path, text: str, message: str) -> None:
    path = stages / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(path))


def test_a_missing_file_lists_the_recipes() -> None:
    with pytest.raises(FileNotFoundError, match=r"no pipeline 'nowhere.yaml'.*recipes"):
        load_pipeline("nowhere.yaml")


def test_an_input_may_be_a_path(stages: Path) -> None:
    (stages / "numbers.txt").write_text("10\n20\n")
    text = f"""
        name: demo
        stages:
          total: {{inputs: {{log: {stages}/numbers.txt}}}}
    """
    out = run(stages, text)
    assert json.loads((out / "total" / "total.json").read_text()) == 30
    (stages / "numbers.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"stages.total.inputs.log: .*does not exist"):
        run(stages, text)


def test_the_same_kind_of_stage_may_stand_twice(stages: Path) -> None:
    out = run(stages, "name: x\nstages: {count: , more: {uses: count, numbers: 7}}")
    assert len((out / "more" / "log.txt").read_text().split()) == 7


def test_shipped_recipes_load() -> None:
    for name in pipeline_config.recipes():
        assert load_pipeline(name).steps
