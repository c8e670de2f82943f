#!/usr/bin/env python3
"""A run's curriculum as a Parquet data set that others can train on: every task with its provenance, verdicts and audit flags.

    python tools/export_curriculum.py runs/quickstart curriculum.parquet --valid-only --min-pass 0.1 --without duplicate refers
    datasets.load_dataset("parquet", data_files="curriculum.parquet")

The columns are listed in megatron_spice/curriculum/rows.py. Exit code 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.curriculum.export import Wanted, export  # noqa: E402
from megatron_spice.curriculum.rows import Run  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a recipe's run.dir")
    parser.add_argument("output", type=Path, metavar="OUTPUT.parquet")
    parser.add_argument("--valid-only", action="store_true", help="no invalid attempts")
    parser.add_argument("--reasoner-tasks", action="store_true", help="only the tasks that the Reasoner was trained on")
    parser.add_argument("--min-pass", type=_share, metavar="P", help="answered, and so many right at least")
    parser.add_argument("--max-pass", type=_share, metavar="P", help="answered, and so many right at most")
    parser.add_argument("--min-agreement", type=_share, metavar="P", help="agreement of an audit that answered again, at least")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=["copied", "refers", "gives_away", "duplicate"], help="leave these out"
    )
    options = parser.parse_args(arguments)
    wanted = Wanted(
        options.valid_only, options.reasoner_tasks, options.min_pass, options.max_pass, options.min_agreement,
        tuple(options.without),
    )  # fmt: skip
    try:
        written, seen = export(Run.open(options.run_dir), options.output, wanted)
    except (ValueError, OSError) as error:
        print(f"export_curriculum: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {written:,} of {seen:,} attempts")
    return 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
