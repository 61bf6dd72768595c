"""Copy common/*.py into the tools that use them, or (--check) say where a copy has drifted.

A tool must build and run alone, so what several tools share is copied, not imported; this
script and the lint step keep the copies equal to the one source here.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = HERE.parent / "packages"
HEADER = "# Copied from common/{name} by common/sync.py: change it there.\n"

# Which tool holds a copy of what.
COPIES = {
    "_files.py": ["testbed", "minicpm4", "ultraclean", "bitcpm", "cpmcu"],
    "_cli.py": ["testbed", "minicpm4", "ultraclean", "bitcpm", "cpmcu", "infllm2"],
}


def main() -> int:
    """Write the copies, or with --check only compare; returns the number of drifted copies."""
    check = "--check" in sys.argv[1:]
    drifted = 0
    for name, tools in COPIES.items():
        wanted = HEADER.format(name=name) + (HERE / name).read_text(encoding="utf-8")
        for tool in tools:
            copy = PACKAGES / tool / "src" / tool / name
            if copy.exists() and copy.read_text(encoding="utf-8") == wanted:
                continue
            if check:
                print(f"{copy} differs from common/{name}: run python common/sync.py")
                drifted += 1
            else:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(wanted, encoding="utf-8")
    return drifted


if __name__ == "__main__":
    sys.exit(min(main(), 1))
