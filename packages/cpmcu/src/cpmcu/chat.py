"""A conversation in the terminal, or over a pipe: one turn per line."""

from __future__ import annotations

import sys
from typing import TextIO

from cpmcu.engine import Engine
from cpmcu.results import Stats, Stream

HELP = "/exit ends, /reset starts over, Ctrl-C stops the answer"


def run(
    engine: Engine,
    *,
    system: str | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    stats: bool = False,
) -> list[dict[str, str]]:
    """Read a line, stream the answer, until /exit or the end of input.

    Prompts and hints are only written when `stdin` is a terminal, so a pipe gets answers alone.
    A turn that does not fit the context is refused with one line and forgotten; Ctrl-C stops the
    answer, whose text so far stays in the conversation.

    Args:
        engine: with a tokenizer that has a chat template.
        system: first message of every conversation; None leaves it to the template.
        stdin: where turns come from, None for the process's; likewise `stdout` for answers.
        stats: also write each answer's cost.

    The others are as in `Engine.generate`. Returns the messages of the last conversation.
    """
    source, out = stdin or sys.stdin, stdout or sys.stdout
    terminal = source.isatty()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    if terminal:
        print(HELP, file=out)
    while True:
        if terminal:
            print("> ", end="", file=out, flush=True)
        try:
            line = source.readline()
        except KeyboardInterrupt:  # at the prompt it only clears the line
            print(file=out)
            continue
        turn = line.strip()
        if not line or turn == "/exit":
            return messages
        if turn == "/reset":
            messages = list(opening)
            engine.reset()
            continue
        if not turn:
            continue
        asked = [*messages, {"role": "user", "content": turn}]
        try:
            stream = engine.generate(
                messages=asked,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop,
                stream=True,
            )
        except ValueError as error:
            # Too long, or refused by the template. The first turn shows a fault of the setting.
            if not messages[len(opening) :] and not terminal:
                raise
            print(f"error: {error} (/reset starts over)", file=out, flush=True)
            continue
        assert isinstance(stream, Stream)
        messages = [*asked, {"role": "assistant", "content": _show(stream, out)}]
        if stats and (cost := _cost(stream)) is not None:
            print(_summary(cost), file=out, flush=True)


def _show(stream: Stream, out: TextIO) -> str:
    """Write the pieces as they come; the text written, also when Ctrl-C cuts it."""
    shown: list[str] = []
    try:
        for piece in stream:
            shown.append(piece)
            print(piece, end="", file=out, flush=True)
    except KeyboardInterrupt:
        stream.close()
        print(" [stopped]", end="", file=out)
    print(file=out, flush=True)
    return "".join(shown)


def _cost(stream: Stream) -> Stats | None:
    try:
        return stream.result.stats
    except RuntimeError:  # stopped before its end
        return None


def _summary(cost: Stats) -> str:
    return (
        f"[{cost.prompt_tokens} prompt tokens ({cost.reused_tokens} reused) at "
        f"{cost.prefill_tokens_per_second:.0f}/s, {cost.new_tokens} new at "
        f"{cost.decode_tokens_per_second:.1f}/s]"
    )
