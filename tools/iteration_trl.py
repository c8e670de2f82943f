"""TRL's side of `tools/benchmark.py iteration`: its GRPOTrainer (`loss_type="dr_grpo"`) on what our iterations trained on.

A step of TRL's does what one of our iterations does: it samples the completions and takes one optimiser step on them. It is
given the prompts of that iteration, and every completion gets as many tokens as ours had in its place: a logits processor
bans the end of text before that and leaves nothing else then. So both sides have the same sequences by number and length, and
generation takes as many forward passes as it has to in a batch that runs until its longest completion has ended.

What TRL is given its due:
- bf16 weights and a bf16 AdamW, without the float32 copies that ours keeps, and no gradient checkpointing, log or save;
- prompts as token ids, and a reward that costs nothing: it does not verify;
- only what was trained on. Our Challenger's other tasks have to be answered too, to pay for them, and more attempts are made
  where none was valid: TRL has no such thing and does not generate them;
- the fastest of several batch shapes, tried on the first batch. A batch of prompts of one role has less padding, a small one
  less still; a large one has fewer forward passes.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_spice.cluster.children import Child

BENCHMARK = Path(__file__).with_name("benchmark.py")
# With them accelerate would make a distributed job of one process of it, whose gradients are copied.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Batch:
    """What one iteration trained on: `prompts` [groups][tokens], `lengths` [groups][group size] of the completions, and the
    `seconds` it took us."""

    prompts: list[list[int]]
    lengths: list[list[int]]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens, each sequence with its own prompt."""
        return sum(len(each) * len(prompt) + sum(each) for prompt, each in zip(self.prompts, self.lengths))


@dataclass(frozen=True)
class Shape:
    """How TRL divides a step: sequences a forward and backward pass, and passes for which it generates at a time."""

    train: int
    passes: int

    def describe(self) -> str:
        return f"{self.train * self.passes} generated and {self.train} trained on at a time"


def shapes(num_groups: int, group_size: int) -> list[Shape]:
    """What is tried: all sequences generated together or one role's, trained on in batches of halves and a quarter."""
    found = []
    for generated, trained in ((1, 2), (2, 2), (2, 4)):
        if num_groups % trained == 0:
            found.append(Shape(num_groups // trained * group_size, trained // generated))
    return found or [Shape(num_groups * group_size, 1)]


def run_theirs(model: str, batches: Sequence[Batch], shape: dict[str, int] | None, folder: Path) -> dict[str, Any]:
    """Steps on batches in a process of its own, whose memory is given back before anything else runs.

    Args:
        shape: fields of a `Shape`; None: the fastest on the first batch.

    Returns: `seconds` of the steps, `shape` (its fields), and the seconds of all shapes that were `tried`.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    job = {"suite": "iteration", "theirs": {"model": model, "batches": [asdict(batch) for batch in batches], "shape": shape}}
    about, result = folder / "theirs.json", folder / "their_result.json"
    about.write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    command = [sys.executable, str(BENCHMARK), "rank", f"@{about}", str(result)]
    child = Child(command, log_path=folder / "theirs.log", environment=environment)
    try:
        while (code := child.exit_code()) is None:
            time.sleep(0.2)
    finally:
        child.stop()
    if code:
        raise RuntimeError(f"TRL's side ended with exit code {code}:\n{child.log_tail(40)}")
    return json.loads(result.read_text())


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What `run_theirs` asks its process for."""
    theirs, batches, tried = Theirs(Path(job["model"])), [Batch(**batch) for batch in job["batches"]], {}
    shape = Shape(**job["shape"]) if job["shape"] else None
    if shape is None:
        shape, tried = theirs.fastest(batches[0])
    return {"seconds": theirs.seconds(batches, shape), "shape": asdict(shape), "tried": tried}


class Theirs:
    """TRL with a model. `seconds(batches, shape)` takes a step on each."""

    def __init__(self, model: Path) -> None:
        _import_transformers()
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._sample = self._model.generate

    def fastest(self, batch: Batch, tried: Sequence[Shape] = ()) -> tuple[Shape, dict[str, float]]:
        """The shape in which a step on a batch takes least, and the seconds of all."""
        tried = tried or shapes(len(batch.prompts), len(batch.lengths[0]))
        took = {shape: self.seconds([batch], shape)[0] for shape in tried}
        return min(took, key=took.__getitem__), {shape.describe(): seconds for shape, seconds in took.items()}

    def seconds(self, batches: Sequence[Batch], shape: Shape) -> list[float]:
        """Seconds of a step on each batch. One that is not timed comes first, on little, for what a trainer's first step makes.

        Raises:
            RuntimeError: TRL did not see as many tokens as the batches have.
        """
        import trl
        from datasets import Dataset

        batches = [_little(batches[0]), *batches]
        group_size, num_groups = len(batches[0].lengths[0]), len(batches[0].prompts)
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        lengths = [each for batch in batches for each in batch.lengths]
        if {len(each) for each in lengths} != {group_size} or {len(batch.prompts) for batch in batches} != {num_groups}:
            raise ValueError("TRL needs as many groups in every batch, of as many completions each")
        ends: list[float] = []
        with tempfile.TemporaryDirectory(prefix="spice-trl-") as folder:
            arguments = trl.GRPOConfig(
                output_dir=folder, loss_type="dr_grpo", beta=0.0, scale_rewards="none", num_generations=group_size,
                max_completion_length=max(map(max, lengths)), per_device_train_batch_size=shape.train,
                steps_per_generation=shape.passes, gradient_accumulation_steps=num_groups * group_size // shape.train,
                max_steps=len(batches), shuffle_dataset=False, use_cpu=True, bf16=False, gradient_checkpointing=False,
                learning_rate=1e-6, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            )  # fmt: skip
            trainer = _told(trl.GRPOTrainer)(
                model=self._model, args=arguments, processing_class=self._tokenizer,
                reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
                train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(prompts))]}),
                callbacks=[_clock(ends)],
            )  # fmt: skip
            trainer.told(prompts, lengths)
            if trainer.accelerator.num_processes != 1 or trainer.accelerator.distributed_type != "NO":
                raise RuntimeError(f"TRL is to run alone, not as {trainer.accelerator.distributed_type}")
            self._model.generate = trainer.sampled(self._sample)
            trainer.train()
        expected = sum(batch.num_tokens for batch in batches)
        if (seen := trainer.state.num_input_tokens_seen) != expected:
            raise RuntimeError(f"TRL saw {seen} tokens where the batches have {expected}")
        return [end - start for start, end in itertools.pairwise(ends)]


def _little(batch: Batch) -> Batch:
    """As many sequences, all short."""
    return Batch([prompt[:16] for prompt in batch.prompts], [[2] * len(each) for each in batch.lengths], 0.0)


def _told(base: type) -> type:
    """A GRPOTrainer whose prompts are numbers of token lists, and whose completions have given lengths."""

    class Told(base):
        def told(self, prompts: Sequence[list[int]], lengths: Sequence[list[int]]) -> None:
            self._prompts, self._lengths, self._rows = prompts, lengths, []

        def sampled(self, generate: Callable[..., Any]) -> Callable[..., Any]:
            def sample(**arguments: Any) -> Any:
                return generate(**arguments, logits_processor=[_ForcedLengths(self._rows, self.eos_token_ids)])

            return sample

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            members: Counter[str] = Counter()
            self._rows = []
            for prompt in prompts:
                self._rows.append(self._lengths[int(prompt)][members[prompt]])
                members[prompt] += 1
            return [self._prompts[int(prompt)] for prompt in prompts], None, {}

    return Told


class _ForcedLengths:
    """Ends row r of a batch after `lengths[r]` tokens, the last of which is an end of text."""

    def __init__(self, lengths: Sequence[int], end_ids: Sequence[int]) -> None:
        import torch

        self._lengths = torch.tensor(lengths)
        self._end_ids = list(end_ids)
        self._done = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._done += 1
        over = self._lengths <= self._done
        scores[:, self._end_ids] = float("-inf")
        scores[over] = float("-inf")
        scores[over, self._end_ids[0]] = 0.0
        return scores


def _clock(ends: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    return Clock()


def _import_transformers() -> None:
    """Without CUDA its torchvision needs a stand-in for triton first."""
    import torch

    from megatron_spice.cluster.platform import STUBS

    if not torch.cuda.is_available():
        if str(STUBS) not in sys.path:
            sys.path.insert(0, str(STUBS))
        import triton  # noqa: F401
    import transformers  # noqa: F401
