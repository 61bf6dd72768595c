"""Reasoning-intensive generation (MiniCPM4 §2.2.2): web text rewritten by a language model.

Any OpenAI-compatible endpoint will do: vLLM's for scale, a small local server's offline. Each
answer is cached by what was asked, checked before it is believed, and kept with a reason where it
fails the check.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultraclean._files import atomic_path, write_json
from ultraclean.ordered import in_order
from ultraclean.reading import records

_TAG = "result"
_RULES = (
    f"Use only what the text says or implies. Write in the text's language. Put everything "
    f"between <{_TAG}> and </{_TAG}>. If the text teaches nothing, write <{_TAG}></{_TAG}>."
)
TASKS = {
    "rewrite": "Edit the text below into a clear passage: leave out menus, advertising and noise, "
    "join what belongs together, complete the steps of its reasoning.",
    "textbook": "Make a textbook section of the knowledge in the text below: explain each point in "
    "several steps, summarise, and end with three exercises and their solutions.",
    "qa": "Ask five questions that the text below answers and that need thought, and answer each "
    "step by step. Begin each question with 'Q:' and each answer with 'A:'.",
    "forum": "Write a discussion in a forum about the topic of the text below: one person asks, "
    "others answer, doubt and correct each other, until it is settled. Begin each post with "
    "the name of its writer and a colon.",
}
"""Name -> what the model is told."""
_SHORTEST = 80
_MOST_COPIED = 0.9


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    Args:
        url: up to and with /v1.
        model: its name for the model.
        key: sent as a bearer token, where there is one; in no cache and no report.
        temperature: of sampling.
        max_tokens: of an answer.
        retries: after a server's error, a refusal for load or a lost connection.
        timeout: seconds for an answer.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    temperature: float = 0.7
    max_tokens: int = 2048
    retries: int = 4
    timeout: float = 300.0

    def ask(self, prompt: str, wait: Callable[[float], None] = time.sleep) -> tuple[str, str]:
        """(answer, why it ended) of one prompt.

        Raises:
            ConnectionError: no answer after all retries, or a refusal that no retry mends.
        """
        body = json.dumps({
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }).encode()  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", body, headers, method="POST"
        )
        last = ""
        for attempt in range(self.retries + 1):
            if attempt:
                wait(min(30.0, 2.0**attempt))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    choice = json.load(response)["choices"][0]
                    return choice["message"]["content"] or "", choice.get("finish_reason") or ""
            except urllib.error.HTTPError as error:
                last = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code < 500 and error.code not in (408, 409, 429):
                    break
            except (OSError, http.client.HTTPException) as error:
                last = str(error)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                last = f"no chat completion in the answer ({error!r})"
        raise ConnectionError(f"{self.url} gave no answer: {last}")


class _Cache:
    """Answers by what was asked, in one SQLite file; each is there once it is stored."""

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path)
        self._base.execute("create table if not exists answers (key text primary key, value text)")

    def get(self, key: str) -> tuple[str, str] | None:
        row = self._base.execute("select value from answers where key = ?", (key,)).fetchone()
        return None if row is None else tuple(json.loads(row[0]))

    def put(self, key: str, value: tuple[str, str]) -> None:
        with self._base:
            self._base.execute("insert or replace into answers values (?, ?)",
                               (key, json.dumps(value)))  # fmt: skip

    def close(self) -> None:
        self._base.close()


def generate(
    inputs: Iterable[Path],
    output: str | Path,
    task: str,
    endpoint: Endpoint,
    workers: int = 8,
    text_key: str = "text",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Write `generated.jsonl`, `failed.jsonl` and `report.json`, in the order of the input.

    A generated row has the input's columns with its text replaced, `ultraclean_task`,
    `ultraclean_model` and `ultraclean_source_text`; a failed one the input's and
    `ultraclean_reason`. After a kill the same call asks only for what the cache lacks. Where the
    endpoint itself fails, the call ends and can be repeated.

    Args:
        inputs: JSON lines.
        output: folder.
        task: of `TASKS`.
        endpoint: whom to ask.
        workers: requests at a time.
        text_key: column of the text.
        progress: called with the number of texts done.

    Raises:
        ValueError: unknown task, or a malformed line.
        ConnectionError: the endpoint does not answer.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: {', '.join(TASKS)}")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    cache = _Cache(folder / "answers.sqlite")
    names = ("model", "temperature", "max_tokens")
    asked = {name: getattr(endpoint, name) for name in names}
    reasons: dict[str, int] = {}
    counts = {"generated": 0, "failed": 0}

    def prepared() -> Iterable[tuple[dict[str, Any], str, str, tuple[str, str] | None]]:
        for _, record in records(inputs, text_key):
            prompt = f"{TASKS[task]} {_RULES}\n\nText:\n{record[text_key]}"
            key = hashlib.sha256(json.dumps([prompt, asked]).encode()).hexdigest()
            yield record, prompt, key, cache.get(key)

    def answered(item: tuple) -> tuple:
        record, prompt, key, known = item
        return record, key, known is None, known or endpoint.ask(prompt)

    try:
        with (
            atomic_path(folder / "generated.jsonl") as good_path,
            atomic_path(folder / "failed.jsonl") as bad_path,
            good_path.open("w", encoding="utf-8") as good,
            bad_path.open("w", encoding="utf-8") as bad,
        ):
            for record, key, new, (answer, ended) in in_order(prepared(), answered, workers):
                if new:
                    cache.put(key, (answer, ended))
                made, reason = check(answer, ended, record[text_key], task)
                if reason:
                    row = {**record, "ultraclean_reason": reason}
                    reasons[reason] = reasons.get(reason, 0) + 1
                else:
                    row = {**record, text_key: made, "ultraclean_task": task,
                           "ultraclean_model": endpoint.model,
                           "ultraclean_source_text": record[text_key]}  # fmt: skip
                counts["failed" if reason else "generated"] += 1
                (bad if reason else good).write(json.dumps(row) + "\n")
                progress(sum(counts.values()))
    finally:
        cache.close()
    report = {"total": sum(counts.values()), **counts, "reasons": dict(sorted(reasons.items())),
              "task": task, **asked}  # fmt: skip
    write_json(folder / "report.json", report)
    return report


def check(answer: str, ended: str, source: str, task: str) -> tuple[str, str]:
    """(text, "") of an answer that can be believed, or ("", why not).

    Args:
        answer: as the model gave it.
        ended: its `finish_reason`.
        source: the text it was made of.
        task: of `TASKS`.
    """
    if ended == "length":
        return "", "cut off (max_tokens)"
    found = re.search(rf"<{_TAG}>(.*?)</{_TAG}>", answer, re.S)
    if found is None:
        return "", "no result tags"
    text = found[1].strip()
    if not text:
        return "", "the model found nothing to teach"
    if len(text) < _SHORTEST:
        return "", "too short"
    words = text.split()
    fives = [tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))]
    if len(set(fives)) < 0.5 * len(fives):
        return "", "repeats itself"
    given = source.split()
    known = {tuple(given[i : i + 5]) for i in range(max(1, len(given) - 4))}
    if task != "rewrite" and sum(f in known for f in fives) > _MOST_COPIED * len(fives):
        return "", "copies the text"
    if task == "qa":
        asked, answers = (len(re.findall(rf"^\W*{c}:", text, re.M)) for c in "QA")
        if not asked or asked != answers:
            return "", "questions and answers do not pair up"
    if task == "forum" and len(set(re.findall(r"^\W*([\w .'-]{1,30}?)\W*:", text, re.M))) < 2:
        return "", "fewer than two people speak"
    return text, ""
