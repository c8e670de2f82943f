"""Everything a run says: a progress line, metrics.jsonl, episodes.jsonl, TensorBoard and, if asked for, W&B.

The JSON lines are the record that other tools read; TensorBoard and W&B are views of it. One process writes them: the
first rank. A resumed run says from which iteration it goes on, and what was written after it is dropped, so that no
iteration stands twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_spice.config.errors import PIP_INSTALL, storing
from megatron_spice.config.schema import Config
from megatron_spice.telemetry.json_lines import JsonLines
from megatron_spice.telemetry.progress import progress_line

METRICS_NAME = "metrics.jsonl"
EPISODES_NAME = "episodes.jsonl"


class _View(Protocol):
    def iteration(self, number: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """The log of the run in `run_dir`, which is made if need be. Use it as a context manager, or `close` it.

    Args:
        resumed_from: iteration of the checkpoint that the run goes on from; 0 is a new run.
        look: called before a file of JSON lines is changed; raises where the run has lost its folder.

    Raises:
        ValueError: W&B or TensorBoard is asked for and not installed.
    """

    def __init__(self, run_dir: Path, config: Config, *, resumed_from: int = 0, look: Callable[[], None] = lambda: None):
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        telemetry = config.telemetry
        self._views: list[_View] = []
        if telemetry.tensorboard:
            self._views.append(_TensorBoard(self._run_dir / "tensorboard", resumed_from))
        if telemetry.wandb_project is not None:
            self._views.append(_WandB(self._run_dir, config, resumed_from))
        self._metrics = JsonLines(self._run_dir / METRICS_NAME, resumed_from, look)
        self._episodes = JsonLines(self._run_dir / EPISODES_NAME, resumed_from, look) if telemetry.episodes else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # What goes wrong here after something else did would only hide it.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    def iteration(self, number: int, total: int, metrics: Mapping[str, float]) -> None:
        """Print iteration `number` of `total` (from 1) and write its metrics: floats by slash-separated name.

        Raises:
            StorageError: the file system does not take them.
        """
        print(progress_line(number, total, metrics), flush=True)
        self._metrics.write([{"iteration": number, "time": time.time(), **metrics}])
        with storing(self._run_dir):
            for view in self._views:
                view.iteration(number, metrics)

    def episodes(self, records: Sequence[dict]) -> None:
        """Write one iteration's episodes; each record has its `iteration`. Call it before `iteration`."""
        if self._episodes is not None:
            self._episodes.write(list(records))

    def close(self) -> None:
        """Close all files and views."""
        self._metrics.close()
        if self._episodes is not None:
            self._episodes.close()
        for view in self._views:
            view.close()


class _TensorBoard:
    def __init__(self, folder: Path, resumed_from: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "telemetry.tensorboard is on but the tensorboard package is missing: "
                f"{PIP_INSTALL} tensorboard, or set telemetry.tensorboard=false"
            ) from error
        # Viewers hide what an earlier, longer attempt wrote for the steps from purge_step on.
        self._writer = SummaryWriter(str(folder), purge_step=resumed_from + 1 if resumed_from else None)

    def iteration(self, number: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path, config: Config, resumed_from: int):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"telemetry.wandb_project={config.telemetry.wandb_project} needs the wandb package: "
                f"{PIP_INSTALL} wandb, or take the key out of the recipe"
            ) from error
        # The run's id lies beside its logs, so that a resumed run goes on in the same W&B run.
        id_file = run_dir / "wandb_id.txt"
        if resumed_from == 0 or not id_file.is_file():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=config.telemetry.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def iteration(self, number: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=number)

    def close(self) -> None:
        self._run.finish()
