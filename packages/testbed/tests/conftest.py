from __future__ import annotations

from typing import Any

import pytest

import testbed


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The real model and its tokenizer; converts into the user's cache if this is the first use."""
    return testbed.smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2: tuple[Any, Any]) -> Any:
    """The real tokenizer, with a chat template."""
    return smollm2[1]
