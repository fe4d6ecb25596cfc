"""Scripts import this first: what goes wrong while the slow imports run ends in one line, too."""

import atexit
import os
import signal
import sys
from pathlib import Path

from sert_min.io.errors import last_line, let_go_of_stdout, stop_at_once


def show(kind, error, traceback) -> None:
    if (told := last_line(error)) is None:
        return sys.__excepthook__(kind, error, traceback)
    return print(told[0], end="\n" * bool(told[0]), file=sys.stderr)


if Path(getattr(sys.modules["__main__"], "__file__", "")).parent == Path(__file__).parents[2]:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (2>&-)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the life of the process)
    sys.excepthook = show
    atexit.register(let_go_of_stdout)
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # else: `&` of a shell ignores it
        signal.signal(signal.SIGINT, stop_at_once)
