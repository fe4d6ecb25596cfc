"""One-line errors: what went wrong and how to mend it."""

import errno
import os
import shlex
import sys

import torch


class SertError(Exception):
    """A problem that the user can mend. The message is one line and names the fix."""


def need(ok, message: str) -> None:
    """Raise SertError(message) unless `ok`."""
    if not ok:
        raise SertError(message)


def run_script(main, args) -> None:
    """Run `main(args)`; known errors become one line on stderr and a non-zero exit status."""
    try:
        main(args)
    except SertError as e:
        sys.exit(f"error: {printable(str(e))}")
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the same command to continue", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory; give a smaller --rows or --block-questions")
    except OSError as e:
        blocked = (errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR)
        hints = dict.fromkeys(blocked, "choose a writable folder with --out-dir")
        hints[errno.ENOENT] = "make its folder first"
        hints[errno.ENOSPC] = hints[errno.EDQUOT] = "free some space, then repeat the same command"
        if e.errno not in hints:
            raise
        where = f": {printable(str(e.filename))}" if e.filename else ""  # writes carry no name
        sys.exit(f"error: {e.strerror}{where}; {hints[e.errno]}")


def printable(text: str) -> str:
    """`text` on one line without control characters: model and data text is not trusted."""
    return "".join(c if c.isprintable() else " " for c in text)


def printable_lines(text: str) -> str:
    """The same for text whose line ends are wanted."""
    return "\n".join(map(printable, text.split("\n")))


def this_command() -> str:
    """The command line that started this process, or torchrun."""
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = ["torchrun", "--nproc-per-node", str(n)] if n > 1 else ["python"]
    return shlex.join([*launcher, *sys.argv])
