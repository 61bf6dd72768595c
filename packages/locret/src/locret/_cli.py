# Copied from common/_cli.py by common/sync.py: change it there.
"""How every command of the house ends: one clear line and exit code 2 on a user's error."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer

# What a user can cause and mend. Anything else is our defect and keeps its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, ImportError, PermissionError)


def run(app: typer.Typer) -> NoReturn:
    """Run a Typer application as a console script.

    Exit codes: 0 done, 2 user's error (one line on standard error), 130 interrupted. Set
    MINICPM4_DEBUG=1 to see the traceback of a user's error as well.
    """
    debug = os.environ.get("MINICPM4_DEBUG") == "1"
    try:
        # Typer's own handling of usage errors and --help stays; ours sees only what commands raise.
        app()
    except USER_ERRORS as error:
        if debug:
            raise
        _fail(str(error) or type(error).__name__)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        _fail(f"no space left on the device{where}: free some, then run the same command again")
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0)


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
