#!/usr/bin/env python3
"""A report on a run, or on several side by side: one HTML file that needs no network, and the same figures as PNG.

    python tools/report.py runs/quickstart                      # writes runs/quickstart/report.html
    python tools/report.py runs/full-0 runs/full-1 runs/fixed-0 -o report.html
    python tools/report.py runs/quickstart --png figures/       # a file a figure, too
    python tools/report.py runs/quickstart -o report.png        # the figures alone, on one sheet

It answers whether the Challenger and the Reasoner are getting better, what the questions look like and where the time goes,
with intervals, and lets one search the episodes. Runs whose recipes differ only in the seed are taken together.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.report.groups import group_runs  # noqa: E402
from megatron_spice.report.page import figures_by_section, page  # noqa: E402
from megatron_spice.report.runs import Run, read_run  # noqa: E402
from megatron_spice.report.summary import summary  # noqa: E402
from megatron_spice.telemetry import rank_logs  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="report to write, .html or .png [report.html beside the metrics]")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also write each figure there as PNG")
    args = parser.parse_args(arguments)
    output = args.output or _default(args.run_dirs)
    if output.suffix not in (".html", ".png"):
        parser.error(f"--output {output}: the name must end with .html or .png")
    for folder in args.run_dirs:
        if logs := rank_logs.listed(rank_logs.read(folder)):
            print(logs)
    try:
        _write([read_run(folder) for folder in _distinct(args.run_dirs)], output, args.png)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def _write(runs: Sequence[Run], output: Path, png: Path | None) -> None:
    figures = [figure for found in figures_by_section(group_runs(runs)).values() for figure in found]
    for run in runs:
        print(summary(run))
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".html":
        partial = output.with_name(f".{output.name}.{os.getpid()}")
        partial.write_text(page(runs), encoding="utf-8")
        os.replace(partial, output)
    if png is not None or output.suffix == ".png":
        from megatron_spice.report.png import save_figures, save_sheet  # matplotlib takes a second

        if png is not None:
            print(f"figures: {len(save_figures(figures, png))} in {png}")
        if output.suffix == ".png":
            save_sheet(figures, ", ".join(run.name for run in runs), output)
    print(f"report: {output}")


def _default(folders: Sequence[Path]) -> Path:
    """Into a single run's folder; of several, beside them."""
    if len(folders) == 1:
        return folders[0] / "report.html"
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders])) / "report.html"


def _distinct(folders: Sequence[Path]) -> list[Path]:
    return list({folder.resolve(): folder for folder in folders}.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
