"""The chat loop over pipes and a pretended terminal."""

from __future__ import annotations

import io

import pytest

from cpmcu import chat


class Terminal(io.StringIO):
    """A StringIO that claims to be a terminal; items that are exceptions are raised."""

    def __init__(self, *lines):
        super().__init__()
        self._lines = iter(lines)

    def isatty(self):
        return True

    def readline(self):
        line = next(self._lines, "")
        if isinstance(line, BaseException):
            raise line
        return line


def talk(engine, text, **options):
    out = io.StringIO()
    messages = chat.run(engine, stdin=io.StringIO(text), stdout=out, max_new_tokens=8, **options)
    return messages, out.getvalue()


def test_a_pipe_gets_one_answer_per_line_and_nothing_else(smollm2):
    messages, shown = talk(smollm2, "What is the capital of France?\n\nAnd of Spain?\n")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert shown == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")
    assert "Paris" in messages[1]["content"]


def test_answers_equal_those_of_generate(smollm2):
    messages, _ = talk(smollm2, "Name a fruit.\nAnother one.\n", system="Be brief.")
    assert messages[0] == {"role": "system", "content": "Be brief."}
    smollm2.reset()
    fresh = smollm2.generate(messages=messages[:-1], max_new_tokens=8)
    assert fresh.text == messages[-1]["content"]


def test_later_turns_reuse_the_cache(smollm2):
    _, shown = talk(smollm2, "Name a fruit.\nAnother one.\n", stats=True)
    reused = [int(line.split("(")[1].split()[0]) for line in shown.splitlines() if "reused" in line]
    assert reused[0] == 0 and reused[1] > 30


def test_exit_and_reset(smollm2):
    messages, _ = talk(smollm2, "My name is Ada.\n/reset\nHello\n/exit\nnever asked\n", system="S")
    assert [m["content"] for m in messages[:2]] == ["S", "Hello"] and len(messages) == 3


def test_interrupt_stops_the_answer_only(smollm2, monkeypatch):
    out = io.StringIO()
    feed, calls = smollm2.feed, []

    def interrupted(tokens):
        calls.append(tokens)
        if len(calls) == 5:  # the prompt is the first
            raise KeyboardInterrupt
        return feed(tokens)

    monkeypatch.setattr(smollm2, "feed", interrupted)
    terminal = Terminal("Tell me a story.\n", KeyboardInterrupt(), "Hi\n", "/exit\n")
    messages = chat.run(smollm2, stdin=terminal, stdout=out, max_new_tokens=8)
    assert " [stopped]" in out.getvalue()
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"] and messages[3]["content"]


def test_a_turn_that_does_not_fit_is_refused_and_forgotten(smollm2_folder):
    from cpmcu import Engine

    engine = Engine.from_pretrained(smollm2_folder, max_context=64)
    out = io.StringIO()
    terminal = Terminal("word " * 80 + "\n", "Hi\n")
    messages = chat.run(engine, stdin=terminal, stdout=out, max_new_tokens=4)
    assert "error: the prompt has" in out.getvalue() and "max_context=64" in out.getvalue()
    assert [m["content"] for m in messages][0] == "Hi"
    with pytest.raises(ValueError, match="max_context=64"):  # a script must fail
        chat.run(engine, stdin=io.StringIO("word " * 80 + "\n"), stdout=out)


def test_without_template_there_is_no_chat(tiny_folder):
    from cpmcu import Engine

    engine = Engine.from_pretrained(tiny_folder("llama")[1])
    with pytest.raises(ValueError, match="messages needs a tokenizer"):
        chat.run(engine, stdin=io.StringIO("Hi\n"), stdout=io.StringIO())
