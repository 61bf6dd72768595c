"""Chat templates: Jinja programs that come with a model, run in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

# What a wrong or hostile template makes Python raise while it runs.
_FAULTS = (TypeError, KeyError, AttributeError, RecursionError, ArithmeticError, ValueError)


class ChatTemplate:
    """A compiled chat template. `source` names it in errors, `tokens` are its constants, `text` is
    the program.

    Templates are untrusted programs: they run in Jinja's immutable sandbox, which has no access
    to attributes that lead out of the data.
    """

    def __init__(self, text: str, source: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self.text, self._source, self._tokens = text, source, dict(tokens)
        try:
            self._template = environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"{source}: the chat template is not valid Jinja ({error})") from None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt that asks for the assistant's next message.

        Args:
            messages: mappings with at least "role" and "content", oldest first.
            variables: further names the template reads, such as `enable_thinking` or `tools`.
        """
        from jinja2 import TemplateError

        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"messages[{i}] must be a mapping with 'role' and 'content'")
        names = {"messages": list(messages), "add_generation_prompt": True, **self._tokens}
        try:
            return self._template.render(**names | variables)
        except (TemplateError, *_FAULTS) as error:
            raise ValueError(
                f"{self._source}: the chat template refuses the messages: {error}"
            ) from None


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
