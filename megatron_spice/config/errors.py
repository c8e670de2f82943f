"""The error of a recipe: all that is wrong with it at once, each line with a key, a value and a way out.

A recipe is written by hand and started from far away: being told of one mistake a start wastes a queue slot a mistake.
"""

from __future__ import annotations

EXIT_CODE = 2
"""What a command line ends with when the recipe is at fault, and nothing has been started."""


class ConfigError(ValueError):
    """A recipe that cannot be run. `problems` holds one message a mistake; `str()` is all of them."""

    def __init__(self, problems: list[str] | str, recipe: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        where = f"{count} in {recipe}" if recipe else count
        super().__init__("\n".join([f"{where}:", *(f"  - {problem}" for problem in self.problems)]))
