"""The command line: `python -m megatron_spice COMMAND`.

Everything a recipe can be wrong about is found here, before torch is imported and before a process is started; it ends
with exit code 2 and a message on stderr. Only `train` loads the heavy stack, and loads it last.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
from pathlib import Path
from typing import NoReturn

from megatron_spice import doctor, machine, plan
from megatron_spice.checkpoint import ownership
from megatron_spice.cluster.children import die_with_parent
from megatron_spice.cluster.exit_codes import INTERRUPTED
from megatron_spice.config.checks import check
from megatron_spice.config.describe import reference, resolved
from megatron_spice.config.errors import EXIT_CODE, ConfigError, StorageError
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import Config
from megatron_spice.policy import checkpoint_room
from megatron_spice.telemetry.rank_log import RankLog

RECIPE_HELP = "a YAML recipe; examples/ holds some"
OVERRIDE_HELP = "settings that go over the recipe's, such as train.iterations=2"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a recipe that cannot be run, or 1 where a run could not write."""
    options = _parsed(arguments)
    try:
        return options.run(options) or 0
    except ConfigError as error:
        # Every rank of a job reads the same recipe; one of them complains.
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron_spice: {error}", file=sys.stderr)
        return EXIT_CODE
    except StorageError as error:
        print(f"megatron_spice (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_spice", description="SPICE self-play on Megatron-Core and SGLang.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _recipe_command(commands, "train", _train, "train a recipe (one rank; slurm/spice.sh starts them all)")
    command = _recipe_command(commands, "plan", _plan, "print what a recipe would do; starts nothing")
    command.add_argument("--nodes", type=_positive, default=1, help="number of nodes (default 1)")
    command.add_argument("--calibration", type=Path, help="what work costs here (tools/benchmark.py calibrate); default: by device")
    command = _recipe_command(commands, "launch-env", _launch_env, "check a recipe; print what slurm/spice.sh needs")
    command.add_argument("--nodes", type=_positive, default=1, help="number of nodes (default 1)")

    command = commands.add_parser("config", help="print every setting, or a recipe with its defaults filled in")
    command.add_argument("recipe", nargs="?", help=RECIPE_HELP)
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDE_HELP)
    command.set_defaults(run=_config)

    command = commands.add_parser("doctor", help="say what this machine has, and what is missing for which recipe")
    command.add_argument("--json", action="store_true", help="as JSON, for scripts")
    command.add_argument("--nodes", type=_positive, help="nodes like this one that recipes are judged on (default: as their names say)")
    command.set_defaults(run=lambda options: doctor.main(options.json, options.nodes))

    command = commands.add_parser("watch", help="a run on one screen, while it goes on")
    command.add_argument("run_dir", type=Path, help="the recipe's run.dir")
    command.add_argument("--once", action="store_true", help="print the screen once")
    command.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default 2)")
    command.set_defaults(run=_watch)
    return parser


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    """As argparse has it, and overrides may stand before, between and after a command's options.

    argparse gives a list of words to the first place where it may be empty, and calls those that follow an option unknown; what it
    has for such lines (`parse_intermixed_args`) knows no commands.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _recipe_command(commands: argparse._SubParsersAction, name: str, run: object, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help)
    command.add_argument("recipe", help=RECIPE_HELP)
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDE_HELP)
    command.set_defaults(run=run)
    return command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _load(options: argparse.Namespace) -> Config:
    return load_config(options.recipe, options.overrides)


def _train(options: argparse.Namespace) -> int:
    config = _load(options)
    world_size = os.environ.get("WORLD_SIZE")
    if world_size is None:
        raise ConfigError(
            "`megatron_spice train` is one rank, started by torchrun (WORLD_SIZE is not set); "
            f"start all of them with `bash slurm/spice.sh {options.recipe}`"
        )
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if per_node != config.cluster.ranks_per_node:
        raise ConfigError(
            f"cluster.ranks_per_node={config.cluster.ranks_per_node}, but torchrun started {per_node} ranks on this node; "
            f"give torchrun --nproc-per-node={config.cluster.ranks_per_node}, or start with slurm/spice.sh"
        )
    architecture = check(config, num_nodes=int(world_size) // per_node, device=machine.device(config.cluster.device))
    text, too_much = plan.memory(config, architecture, ParallelLayout.of(config.policy, architecture, int(world_size)))
    if os.environ.get("RANK", "0") == "0":  # which writes most, and ends the others if it ends
        room, too_full = checkpoint_room.describe(config, architecture)
        print(text, room, sep="\n", flush=True)
        too_much = [*too_much, too_full] if too_full else too_much
    if too_much:
        raise ConfigError(too_much, options.recipe)
    # A torchrun that is killed cannot end its ranks; the kernel does it, and each rank's engines follow the same way.
    die_with_parent(os.getppid())
    try:
        with RankLog(config.run.dir, int(os.environ.get("RANK", "0")), int(world_size), interrupted_code=INTERRUPTED):
            from megatron_spice.train import train

            train(config)
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 1)  # in here, where `end` keeps what the run was made of
    _leave(0)


def _leave(code: int) -> NoReturn:
    """Ends a rank whose work is done and told, without taking torch apart: its connections say goodbye to ranks and to a store that
    may have gone first, and abort the process (SIGABRT, "Broken pipe") when nobody listens. Nothing may be collected either."""
    gc.disable()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _plan(options: argparse.Namespace) -> int:
    config = _load(options)
    text, problems = plan.describe(config, options.nodes, options.calibration)
    print(text)
    print(plan.job(config, options.nodes, [options.recipe, *options.overrides], options.calibration))
    if problems:
        raise ConfigError(problems, options.recipe)
    return 0


def _launch_env(options: argparse.Namespace) -> int:
    config = _load(options)
    check(config, options.nodes)
    if (problem := ownership.in_use(config.run.dir)) is not None:
        raise ConfigError(problem, options.recipe)
    print(plan.launch_environment(config))
    return 0


def _watch(options: argparse.Namespace) -> int:
    from megatron_spice.watch import watch

    watch(options.run_dir, options.once, options.interval)
    return 0


def _config(options: argparse.Namespace) -> int:
    if options.recipe is None:
        print(reference())
    else:
        print(resolved(_load(options)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
