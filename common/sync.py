"""Copy what is common into the tools that use it, or (--check) say where a copy has drifted.

A tool must build and run alone, so what several tools share is copied, not imported; this
script and the lint step keep the copies equal to the one source here.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = HERE.parent / "packages"
HEADER = "{comment} Copied from common/{name} by common/sync.py: change it there.\n"

NATIVE = ["infllm2", "bitcpm", "cpmcu"]  # tools with C++ kernels
ATTENTION = ["infllm2", "cpmcu"]  # those of them that attend

# Which tool holds a copy of what: Python beside its own, the rest in csrc/native/.
COPIES = {
    "_files.py": ["testbed", "minicpm4", "ultraclean", "bitcpm", "cpmcu", "locret", "densing"],
    "_attention.py": ["apb", "locret"],
    "_cli.py": [
        *("testbed", "minicpm4", "ultraclean", "bitcpm", "cpmcu", "infllm2", "densing", "apb"),
        "locret",
    ],
    "_native.py": NATIVE,
    "native/Native.cmake": [*NATIVE, "ultraclean"],
    "native/amx.hpp": [*ATTENTION, "bitcpm"],
    "native/amx_attend.hpp": ATTENTION,
    "native/attend.hpp": ATTENTION,
    "native/attend_args.h": ATTENTION,
    "native/broadcast_gemm.hpp": ATTENTION,
    "native/compress.hpp": ATTENTION,
    "native/cpu_level.hpp": [*NATIVE, "ultraclean"],
    "native/few_floats.hpp": ATTENTION,
    "native/few_heads.hpp": ATTENTION,
    "native/few_int8.hpp": ATTENTION,
    "native/formats.hpp": ATTENTION,
    "native/int8_rows.hpp": ATTENTION,
    "native/lanes.hpp": ATTENTION,
    "native/parallel.hpp": ["infllm2", "bitcpm"],
    "native/rows.hpp": ATTENTION,
    "native/run.hpp": ATTENTION,
    "native/select.hpp": ATTENTION,
    "native/select_args.h": ATTENTION,
}


def main() -> int:
    """Write the copies, or with --check only compare; returns the number of drifted copies."""
    check = "--check" in sys.argv[1:]
    drifted = 0
    for name, tools in COPIES.items():
        comment = "//" if name.endswith((".hpp", ".h")) else "#"
        header = HEADER.format(name=name, comment=comment)
        wanted = header + (HERE / name).read_text(encoding="utf-8")
        for tool in tools:
            folder = f"src/{tool}" if name.endswith(".py") else "csrc"
            copy = PACKAGES / tool / folder / name
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
