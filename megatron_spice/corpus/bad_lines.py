"""Broken lines of the inputs: written down beside the part that was made without them, `FILE:LINE: reason` each."""

from __future__ import annotations

from pathlib import Path

from megatron_spice.corpus.build_options import BadInput

FILE_NAME = "bad_lines.txt"
_MOST_WRITTEN = 10_000  # of a part: an input of nothing but broken lines must not fill the disk
_LONGEST = 500  # characters


class BadLines:
    """Takes broken lines of one part, as `bad` of `read_unit`; there is a file only when there were any.

    Raises:
        BadInput: when called, if `strict`.
    """

    def __init__(self, folder: Path, strict: bool):
        self._path, self._strict = folder / FILE_NAME, strict
        self.count = 0

    def __call__(self, path: str, line: int, reason: str) -> None:
        message = _one_line(f"{path}:{line}: {reason}")
        if self._strict:
            raise BadInput(message)
        self.count += 1
        if self.count <= _MOST_WRITTEN:
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(message + "\n")

    def finish(self) -> None:
        """Say how many were not written down."""
        if self.count > _MOST_WRITTEN:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"... and {self.count - _MOST_WRITTEN} more in this part\n")


def read_bad_lines(folder: Path) -> list[str]:
    """The broken lines of a part."""
    path = folder / FILE_NAME
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _one_line(message: str) -> str:
    """What is printed may come from a file that was made to harm: no control characters, no end."""
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in message[:_LONGEST])
    return shown + ("..." if len(message) > _LONGEST else "")
