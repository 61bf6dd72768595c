"""Generation against a server on this machine that speaks the protocol and misbehaves at will."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ultraclean.generation import Endpoint, check, generate

SCRIPT = Path(sys.executable).parent / "ultraclean"
LONG = (
    "The sun warms the ground, the ground warms the air, and the warm air rises because it is "
    "light. "
)
GOOD = (
    f"<result>{LONG} Cool air flows in from the sea to take its place, which we feel as wind."
    "</result>"
)


class Server(ThreadingHTTPServer):
    """Answers by the number that a text holds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.refusals: dict[str, list[int]] = {}
        self.answers: dict[str, tuple[str, str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][0]["content"].split("Text:\n")[1]
        self.server.asked.append(text)
        assert self.path == "/v1/chat/completions" and request["model"] == "m"
        code = self.server.refusals.get(text, [200]).pop(0)
        answer, ended = self.server.answers.get(text, (GOOD, "stop"))
        body = json.dumps({"choices": [{"message": {"content": answer}, "finish_reason": ended}]})
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode() if code == 200 else b"no")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def test_rewrites_checks_and_keeps_what_fails(server: Server, tmp_path: Path) -> None:
    server.answers = {"cut": ("<result>x", "length"), "bare": ("no tags", "stop")}
    path = write(tmp_path / "in.jsonl", ["one", "cut", "two", "bare"])
    report = generate([path], tmp_path / "out", "rewrite", Endpoint(server.url, "m"), 3)
    assert report["reasons"] == {"cut off (max_tokens)": 1, "no result tags": 1}
    good, bad = read(tmp_path / "out/generated.jsonl"), read(tmp_path / "out/failed.jsonl")
    assert [r["n"] for r in good] == [0, 2] and [r["n"] for r in bad] == [1, 3]
    assert good[0]["text"].startswith("The sun") and good[0]["ultraclean_source_text"] == "one"
    assert bad[0]["text"] == "cut" and "cut off" in bad[0]["ultraclean_reason"]


def test_asks_only_for_what_it_does_not_know(server: Server, tmp_path: Path) -> None:
    server.refusals = {"three": [400]}
    path = write(tmp_path / "in.jsonl", ["one", "two", "three", "four"])
    endpoint = Endpoint(server.url, "m", retries=0)
    with pytest.raises(ConnectionError, match="HTTP 400"):
        generate([path], tmp_path / "out", "rewrite", endpoint, 1)
    assert server.asked == ["one", "two", "three"]
    assert not (tmp_path / "out/generated.jsonl").exists()
    server.refusals = {}
    generate([path], tmp_path / "out", "rewrite", endpoint, 1)
    assert server.asked == ["one", "two", "three", "three", "four"]
    generate([path], tmp_path / "out", "textbook", endpoint, 1)  # other prompts
    assert len(server.asked) == 9
    generate([path], tmp_path / "out", "rewrite", Endpoint(server.url, "m", temperature=0.1), 1)
    assert len(server.asked) == 13


def test_tries_again_when_the_server_is_busy(server: Server) -> None:
    server.refusals = {"busy": [503, 429, 200]}
    waits: list[float] = []
    answer, ended = Endpoint(server.url, "m").ask("Text:\nbusy", waits.append)
    assert (answer, ended, waits) == (GOOD, "stop", [2.0, 4.0])
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="gave no answer"):
        Endpoint(server.url, "m", retries=1).ask("Text:\nx", waits.append)


def test_the_key_is_in_nothing_that_is_written(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server.url, "m", key="sesame")
    generate([write(tmp_path / "in.jsonl", ["one"])], tmp_path / "out", "rewrite", endpoint)
    assert "sesame" not in repr(endpoint)
    for file in (tmp_path / "out").iterdir():
        assert b"sesame" not in file.read_bytes()


@pytest.mark.parametrize(
    ("answer", "task", "reason"),
    [
        ("<result></result>", "rewrite", "nothing to teach"),
        ("<result>short</result>", "rewrite", "too short"),
        (f"<result>{'again and again we say ' * 30}</result>", "rewrite", "repeats itself"),
        (f"<result>{LONG}</result>", "textbook", "copies the text"),
        (f"<result>Q: why? {GOOD[8:-9]}</result>", "qa", "do not pair up"),
        (f"<result>Ann: {GOOD[8:-9]}</result>", "forum", "fewer than two"),
        (f"<result>Q: why does wind blow?\nA: {GOOD[8:-9]}</result>", "qa", ""),
        (f"<result>Ann: why does wind blow?\nBob: {GOOD[8:-9]}</result>", "forum", ""),
        (GOOD, "textbook", ""),
    ],
)
def test_checks(answer: str, task: str, reason: str) -> None:
    text, why = check(answer, "stop", LONG, task)
    assert (reason in why) if reason else (why == "" and text)


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'poem': rewrite, textbook, qa, forum"):
        generate([], tmp_path, "poem", Endpoint("http://x", "m"))


def test_the_command_goes_on_once_the_server_is_there(server: Server, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", ["one", "two", "three"])

    def run(url: str) -> subprocess.CompletedProcess[str]:
        command = [SCRIPT, "generate", path, "-o", tmp_path / "out", "--task", "rewrite",
                   "--url", url, "--model", "m", "--workers", "2"]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True)

    server.refusals = {"three": [401]}
    refused = run(server.url)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "HTTP 401" in refused.stderr and "mend --url, --model or the key" in refused.stderr
    server.refusals = {}
    done = run(server.url)
    assert done.returncode == 0, done.stderr
    assert "3 texts = 3 generated + 0 failed" in done.stdout
    assert sorted(server.asked) == ["one", "three", "three", "two"]
