"""What a build shows on stderr: a bar over the input files' bytes with MB/s and time left, and the first broken lines."""

from __future__ import annotations

import sys

from tqdm import tqdm

from megatron_spice.corpus.build import BuildProgress

BAD_LINES_SHOWN = 20


class Display:
    """Shows progress and broken lines; silent but for the lines where stderr is no terminal.

    Attributes:
        text_bytes: UTF-8 bytes of the texts read in this run.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._step: str | None = None  # that the bar is of, when it is of one before the parts
        self._bad_lines = 0
        self.text_bytes = 0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
        if self._bad_lines > BAD_LINES_SHOWN:
            more = self._bad_lines - BAD_LINES_SHOWN
            print(f"... and {more:,} more broken lines, see bad_lines.txt in the corpus", file=sys.stderr)

    def show(self, progress: BuildProgress) -> None:
        """Called several times a second. What earlier runs had done does not count for the speed."""
        if self._step:
            self._close()
            self._step = None
        if self._bar is None:
            self._bar = tqdm(
                total=progress.total_bytes, initial=progress.disk_bytes, unit="B", unit_scale=True,
                dynamic_ncols=True, disable=None, mininterval=0.5,
            )  # fmt: skip
        self.text_bytes = progress.text_bytes
        text = f"{progress.documents:,} documents, {progress.tokens / 1e6:,.1f}M tokens"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(progress.disk_bytes - self._bar.n)

    def step(self, name: str, done: int, total: int) -> None:
        """Called several times a second in the steps before the parts are made."""
        if self._step != name:
            self._close()
            self._step = name
            self._bar = tqdm(
                desc=name, total=total, initial=done, unit="B" if total > 1000 else " steps", unit_scale=total > 1000,
                dynamic_ncols=True, disable=None, mininterval=0.5,
            )  # fmt: skip
        self._bar.update(done - self._bar.n)

    def say(self, message: str) -> None:
        """Called with what is worth knowing and no error."""
        tqdm.write(message, file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def bad_line(self, message: str) -> None:
        """Called for each broken line."""
        self._bad_lines += 1
        if self._bad_lines <= BAD_LINES_SHOWN:
            tqdm.write(message, file=sys.stderr)
