"""`python -m megatron_spice watch RUN_DIR`: a run's screen, drawn again as the run goes on, until Ctrl-C.

Without a terminal (a pipe, a log) or with `--once` it is printed once.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.live import Live

from megatron_spice.config.errors import ConfigError
from megatron_spice.telemetry.dashboard import Look, draw, engine_logs
from megatron_spice.telemetry.follow import Follower, last_record
from megatron_spice.telemetry.run_log import EPISODES_NAME, METRICS_NAME

RECIPE_NAME = "recipe.yaml"


def watch(run_dir: Path, once: bool = False, interval: float = 2.0, console: Console | None = None) -> None:
    """Draws the run in `run_dir`.

    Raises:
        ConfigError: there is no such run, or what it has written cannot be read.
    """
    if not (run_dir / RECIPE_NAME).is_file() and not (run_dir / METRICS_NAME).is_file():
        raise ConfigError(f"{run_dir} holds no run: neither {RECIPE_NAME} nor {METRICS_NAME}; give a recipe's run.dir")
    console = console or Console()
    follower = Follower(run_dir / METRICS_NAME)
    try:
        if once or not sys.stdout.isatty():
            console.print(draw(_look(run_dir, follower)))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(draw(_look(run_dir, follower)), refresh=True)
                time.sleep(interval)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except KeyboardInterrupt:
        return


def _look(run_dir: Path, follower: Follower) -> Look:
    now = time.time()
    recipe = _recipe(run_dir / RECIPE_NAME)
    return Look(
        name=str(run_dir),
        records=follower.read(),
        now=now,
        total=recipe.get("train", {}).get("iterations"),
        drift_alarm=recipe.get("rollout", {}).get("drift_alarm"),
        episode=last_record(run_dir / EPISODES_NAME),
        engine_logs=engine_logs(run_dir, now),
    )


def _recipe(path: Path) -> dict:
    """The run's recipe; {} while it is not there or only half written. Read without checks: it may be of another version."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}
