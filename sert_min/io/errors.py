"""One-line errors: what went wrong and how to mend it."""

import contextlib
import errno
import io
import itertools
import os
import shlex
import sys
import time


class SertError(Exception):
    """A problem that the user can mend. The message is one line and names the fix."""


def need(ok, message: str, kind: type[Exception] = SertError) -> None:
    """Raise `kind`(message) unless `ok`."""
    if not ok:
        raise kind(message)


HINTS = dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ELOOP),
    "choose a writable folder with --out-dir (for downloads: SERT_CACHE, HF_HOME)",
)
HINTS[errno.ENOENT] = "make its folder first"
HINTS[errno.ENOSPC] = HINTS[errno.EDQUOT] = "free some space, then repeat the same command"
HINTS[errno.ENAMETOOLONG] = "choose a shorter name"
HINTS[errno.EMFILE] = "raise the limit of open files (ulimit -n), then repeat the same command"


INTERRUPTED = "\ninterrupted; repeat the same command to continue"


def last_line(error: BaseException) -> str | None:
    """The one line, or "", to print of an error that a user can meet; None for a fault of ours."""
    match error:
        case SertError():
            return f"error: {printable(str(error))}"
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():  # `sample.py | head`: nobody reads on
            return ""
        case ModuleNotFoundError(name="fcntl"):
            return "error: this needs Linux or macOS; on Windows, run it inside WSL"
        case ModuleNotFoundError(name=str(name)) if not name.startswith("sert_min"):
            return (f"error: this Python has no package {name}; `{sys.executable} -m pip install -r "
                    "requirements.txt` installs it (a venv is best: README, Start)")  # fmt: skip
        case OSError():
            name = printable(str(error.filename or ""))  # none in writes
            hint = HINTS.get(error.errno, "check that disk or folder, then repeat the same command")
            said = error.strerror or printable(str(error))
            return f"error: {said}{': ' * bool(name)}{name}; {hint}"
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):  # torch is not imported here
        return "error: out of memory; give a smaller --rows or --block-questions"
    return None


def stop_at_once(*_) -> None:
    """What Ctrl-C does: imports may swallow a KeyboardInterrupt, and torch's C++ code aborts at one.
    Nothing is lost, since every command survives a kill."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{INTERRUPTED}\n".encode())
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(130)


def run_script(main, args) -> None:
    """Run `main(args)`, or `main(args())`; known errors become one line on stderr and a non-zero exit
    status. Under torchrun one error is one message: processes other than 0 wait for their end, which
    torchrun brings, and speak only if it does not come; process 0 waits, too, where it met no error of
    its own, but the end of another process."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":
            stream.reconfigure(errors="replace")  # ASCII terminals get `?`, not a traceback
    stderr, rank = sys.stderr, os.environ.get("RANK")
    sys.stderr = stderr if rank in (None, "0") else io.StringIO()
    try:
        main(args() if callable(args) else args)
        let_go_of_stdout()
    except BaseException as error:
        told = last_line(error)
        lost = told is None and not isinstance(error, SystemExit)
        if rank and (rank != "0" or lost):
            time.sleep(20 if rank != "0" else 1)  # longer than process 0 may be behind
        if told is None:
            raise
        let_go_of_stdout()
        if told == INTERRUPTED:
            print(told, file=sys.stderr)
            sys.exit(130)
        sys.exit(told or 1)
    finally:
        if sys.stderr is not stderr:
            stderr.write(sys.stderr.getvalue())
            sys.stderr = stderr


def let_go_of_stdout() -> None:
    """Write out what stdout holds; if nobody reads on, drop it, or Python's end would complain."""
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """`text` on one line without control characters: model and data text is not trusted."""
    return "".join(c if c.isprintable() else " " for c in text)


def printable_lines(text: str) -> str:
    """The same for text whose line ends are wanted."""
    return "\n".join(map(printable, text.split("\n")))


def command(script: str, task: str, **flags) -> str:
    """A command line that can be pasted: another script, which lies beside this one, with the words
    `task` and the `flags` that are not None."""
    beside = os.path.join(os.path.dirname(sys.argv[0]), script)
    script = beside if os.path.exists(beside) else script
    given = {f"--{name.replace('_', '-')}": str(x) for name, x in flags.items() if x is not None}
    words = sys.orig_argv[0], script  # this Python, as it was called: .venv/bin/python, say
    return f"{shlex.join(words)} {task} {shlex.join(itertools.chain(*given.items()))}"


def this_command() -> str:
    """The command line that started this process, or torchrun."""
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = ["torchrun", "--nproc-per-node", str(n)] if n > 1 else sys.orig_argv[:1]
    return shlex.join([*launcher, *sys.argv])
