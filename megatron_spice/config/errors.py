"""The errors that a user is told of in words, without a traceback: of a recipe, and of the place a run writes to.

A recipe's is all that is wrong with it at once, each line with a key, a value and a way out.

A recipe is written by hand and started from far away: being told of one mistake a start wastes a queue slot a mistake.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 2
"""What a command line ends with when the recipe is at fault, and nothing has been started."""


PIP_INSTALL = ".venv/bin/python -m pip install -c requirements/constraints.txt"
"""What remedies begin with: a bare pip may be another Python's, and without the constraints other packages may move."""


class ConfigError(ValueError):
    """A recipe that cannot be run. `problems` holds one message a mistake; `str()` is all of them."""

    def __init__(self, problems: list[str] | str, recipe: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        where = f"{count} in {recipe}" if recipe else count
        super().__init__("\n".join([f"{where}:", *(f"  - {problem}" for problem in self.problems)]))


class StorageError(OSError):
    """A file system did not take what a run has to write. `str()` says where, why, and what to do."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raises StorageError for an OSError inside the block, which writes `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}; {what_to_do(error)}") from error


def what_to_do(error: OSError) -> str:
    """In words, after a run could not write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        first = "make room on its file system"
    elif error.errno in (errno.ENOENT, errno.ESTALE, errno.EROFS, errno.ENOTDIR):
        first = "see that its folder is there, mounted and may be written to"
    else:
        first = "mend it"
    return f"{first}, then start the same command again: it goes on from the newest checkpoint"
