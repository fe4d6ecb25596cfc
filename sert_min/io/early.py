"""Scripts import this first: what goes wrong while the slow imports run ends in one line, too."""

import atexit
import os
import signal
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (that is what makes it one line)
    sys.exit(f"error: this is Python {sys.version.split()[0]}; take 3.11 or later (README, Start)")

from sert_min.io.errors import last_line, let_go_of_stdout, stop_at_once  # noqa: E402


def show(kind, error, traceback) -> None:
    if (told := last_line(error)) is None:
        sys.__excepthook__(kind, error, traceback)
    elif told:
        print(told, file=sys.stderr)


if Path(getattr(sys.modules["__main__"], "__file__", "")).parent == Path(__file__).parents[2]:
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers
        if getattr(sys, name) is None:  # closed by the caller (2>&-); else a file gets its number
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (for the life of the process)
    sys.excepthook = show
    atexit.register(let_go_of_stdout)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's `&` ignores it
        signal.signal(signal.SIGINT, stop_at_once)
