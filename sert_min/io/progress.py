"""Progress bars: they fit 60 columns, and without a terminal they are a plain line every 30 seconds."""

import sys
import time

from tqdm import tqdm

EVERY = 30  # seconds between the lines in a log
FORM = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s, {remaining} left{postfix}"


class Lines:
    """A stream for tqdm that gives each state of a bar a line of its own on stderr."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


class Bar(tqdm):
    """A bar over `total` units, and what passes through meanwhile (tokens, say)."""

    def __init__(self, total: int, unit: str, **settings):
        if not sys.stderr.isatty():
            settings |= {"file": Lines(), "mininterval": EVERY, "maxinterval": EVERY, "ncols": 78}
        # smoothing=0: the time that is left comes from the whole run; blocks end all at once.
        usual = {"miniters": 0, "smoothing": 0, "dynamic_ncols": True, "bar_format": FORM}
        super().__init__(total=total, unit=unit, **usual | settings)
        self.tokens, self.start, self.note = 0, time.perf_counter(), ""

    def count(self, tokens: int, ended: int = 0) -> None:
        """Hear of new tokens and of rows that ended (the `progress` of generate.py)."""
        self.tokens += tokens
        rate = self.tokens / (time.perf_counter() - self.start)
        text = f"{rate / 1000:,.1f}k" if rate > 1000 else f"{rate:.0f}"
        self.set_postfix_str(f"{text} tok/s{self.note}", refresh=False)
        self.update(ended)

    def reach(self, n: int) -> None:
        """So many units are done."""
        self.count(0)  # the note may be new
        self.update(n - self.n)

    def spent(self) -> dict:
        return {"tokens": self.tokens, "seconds": round(time.perf_counter() - self.start, 2)}
