"""Converts checkpoints between Hugging Face folders and Megatron's torch_dist format, which is free of any layout.

    python tools/convert_checkpoint.py hf-to-megatron SOURCE TARGET
    python tools/convert_checkpoint.py megatron-to-hf SOURCE TARGET

Both directions read the one name table of `megatron_spice/weights/names.py`, the same that training syncs by. SOURCE of
megatron-to-hf is what hf-to-megatron made, or any checkpoint of a run (`runs/NAME/checkpoints/iteration_0000010`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_spice.checkpoint import hf_files, store  # noqa: E402
from megatron_spice.cluster import platform  # noqa: E402
from megatron_spice.config.errors import ConfigError  # noqa: E402
from megatron_spice.config.hf import read_architecture  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Runs one conversion; exit code 2 with a message when the source or the target is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run in (("hf-to-megatron", to_megatron), ("megatron-to-hf", to_hf)):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        if options.target.exists():
            raise ValueError(f"{options.target} exists; remove it or name another target")
        options.run(options.source, options.target)
    except (ValueError, FileNotFoundError, ConfigError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{options.target} written in {time.perf_counter() - started:.1f} s")
    return 0


def to_megatron(source: Path, target: Path) -> None:
    """A Hugging Face folder to a checkpoint with weights only, in the precision that its tensors have."""
    architecture = read_architecture(source)
    platform.prepare("cpu")
    from megatron_spice.policy.whole_model import WholeModel
    from megatron_spice.weights.hf_folder import HFTensors

    with WholeModel(architecture, source, HFTensors(source).dtype) as model:
        model.load_hf(source)
        partial = _partial(target)
        (partial / store.WEIGHTS).mkdir()
        model.save(partial / store.WEIGHTS)
        hf_files.copy_small_files(source, partial / store.HF)
        partial.rename(target)


def to_hf(source: Path, target: Path) -> None:
    """A checkpoint's weights to a Hugging Face folder, in the precision that the checkpoint has."""
    if not store.is_megatron(source):
        raise ValueError(f"{source} is not a checkpoint: it must hold {store.WEIGHTS}/ and {store.HF}/")
    architecture = read_architecture(source)
    platform.prepare("cpu")
    from megatron_spice.policy.whole_model import WholeModel
    from megatron_spice.weights.hf_folder import write_hf_folder

    dtype = WholeModel.dtype_of(source)
    with WholeModel(architecture, source, dtype) as model:
        model.load(source)
        partial = _partial(target)
        write_hf_folder(model.hf_tensors(), source / store.HF, partial)
        hf_files.set_dtype(partial, str(dtype).removeprefix("torch."))
        partial.rename(target)


def _partial(target: Path) -> Path:
    """A fresh folder beside the target, which takes the target's name once it is whole."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


if __name__ == "__main__":
    sys.exit(main())
