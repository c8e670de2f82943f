"""What the suites of `tools/benchmark.py` share: kinds of argument, and how a table is set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def several(text: str) -> list[int]:
    """Positive numbers with commas between them."""
    return [positive(part) for part in text.split(",")]


def refuse(why: str) -> NoReturn:
    """Ends the benchmark for options that do not fit."""
    sys.exit(f"benchmark.py: {why}")


def need_model_folder(model: str, otherwise: str = "") -> None:
    """Refuses `--model` unless it is a Hugging Face folder; `otherwise` is what else it might have been."""
    if not (Path(model) / "config.json").is_file():
        refuse(f"--model {model} is no Hugging Face folder{otherwise}")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them titles, as lines with aligned columns."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
