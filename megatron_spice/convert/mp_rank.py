"""Megatron-LM's files for each rank as a source (`convert/mp_rank_layout.py` says how they look).

The files say themselves how the model was divided: how many there are, which layers and experts each holds, how wide its
slices are. They are mapped, so an optimiser's state in them costs nothing, and unpickled with nothing but tensors and plain
values: a pickle can otherwise run whatever it likes. Megatron-LM's own classes in `args` become empty stand-ins.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_spice.config.hf import read_architecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.convert.mp_rank_layout import FILE, Seat, chunk_keys, model_arguments
from megatron_spice.convert.source import check_dtype, merge
from megatron_spice.weights.names import Entry, rank_shape, table
from megatron_spice.weights.stage import Key, Stage

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_FOREIGN = ("megatron.", "signal.", "pathlib.", "numpy.", "_codecs.", "transformer_engine.", "apex.")
"""Where names may come from that become stand-ins."""


class MpRankSource:
    """Weights of one iteration.

    Args:
        folder: with `mp_rank_*` in it.
        hf: with config.json and tokenizer.

    Raises:
        ValueError: files are missing, or names, shapes or arguments do not fit config.json.
    """

    kind = "mp_rank"

    def __init__(self, folder: Path, hf: Path) -> None:
        self.folder, self.hf = folder, hf
        self.architecture = read_architecture(hf)
        self.entries = table(self.architecture)
        found = _find(folder)
        self.paths = [*found.values(), hf / "config.json"]
        states = {numbers: load_rank(path) for numbers, path in found.items()}
        first = next(iter(states.values()))
        self._check_arguments(first)
        seats = _seats(list(states), first, self.architecture.num_experts)
        self._states = {seats[numbers]: _parameters(state, found[numbers]) for numbers, state in states.items()}
        self.layout = self._find_layout()
        self._check_all_there()
        self._owners = {entry: self._slices(entry) for entry in self.entries}
        self._check()

    def _check_arguments(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where `args` are those of another model."""
        version = state.get("checkpoint_version", 0)
        if version < 2.0:
            raise ValueError(
                f"{self.folder} is of checkpoint version {version}, whose queries, keys and values are in another order; load and "
                "save it with Megatron-LM first"
            )
        args = state.get("args")
        wanted = {name: value for name, value in model_arguments(self.architecture).items() if hasattr(args, name)}
        if not getattr(args, "group_query_attention", True):
            wanted.pop("num_query_groups", None)
        other = [name for name, value in wanted.items() if getattr(args, name) != value]
        if other:
            theirs = ", ".join(f"{name}={getattr(args, name)}" for name in other)
            ours = ", ".join(f"{name}={wanted[name]}" for name in other)
            raise ValueError(f"{self.folder} was trained with {theirs}, {self.hf / 'config.json'} says {ours}; give its own --hf")

    def _find_layout(self) -> ParallelLayout:
        tensor, pipeline, expert = (max(seat[axis] for seat in self._states) + 1 for axis in range(3))
        virtual = max(chunk for chunk, _ in self._states[Seat(0, 0, 0)]) + 1
        counts = {}
        for stage in range(pipeline):
            names = self._states[next(seat for seat in self._states if seat.pipeline == stage)]
            for index in range(virtual):
                layers = [int(m[1]) for chunk, name in names if chunk == index and (m := _LAYER.match(name))]
                counts[index * pipeline + stage] = max(layers, default=-1) + 1
        if sum(counts.values()) != self.architecture.num_layers:
            raise ValueError(f"{self.folder} has {sum(counts.values())} layers, {self.hf / 'config.json'} {self.architecture.num_layers}")
        return ParallelLayout(tuple(counts[chunk] for chunk in range(len(counts))), tensor, pipeline, expert=expert)

    def _check_all_there(self) -> None:
        """Each tensor rank and each expert rank of each stage has a file. (Where experts are not cut, not all pairs are ranks.)"""
        layout = self.layout
        for stage in range(layout.pipeline):
            here = [seat for seat in self._states if seat.pipeline == stage]
            for what, count in (("tensor", layout.tensor), ("expert", layout.expert)):
                lost = sorted(set(range(count)) - {getattr(seat, what) for seat in here})
                if lost:
                    raise ValueError(f"{self.folder} has no file of {what} rank {lost[0]} in pipeline stage {stage}; copy it again")

    def _slices(self, entry: Entry) -> list[torch.Tensor]:
        """The slices that together are the entry, in order."""
        stage_rank, expert_rank = Stage(0, self.layout, 0, self.architecture.num_experts).owner(entry)
        stage = Stage(stage_rank, self.layout, expert_rank, self.architecture.num_experts)
        slices: dict[int, torch.Tensor] = {}
        for seat, parameters in sorted(self._states.items()):
            if seat.pipeline == stage_rank and (entry.expert is None or seat.expert == expert_rank) and seat.tensor not in slices:
                slices[seat.tensor] = parameters[stage.key(entry, parameters)]
        found = [slices[rank] for rank in sorted(slices)]
        if entry.expert is not None and tuple(found[0].shape) == rank_shape(entry, self.architecture, 1):
            return found[:1]  # with --expert-tensor-parallel-size 1 an expert is on one rank
        return found

    def _check(self) -> None:
        for entry, slices in self._owners.items():
            wanted = rank_shape(entry, self.architecture, len(slices), cut_experts=True)
            for part in slices:
                check_dtype(part.dtype, entry.names[0], self.folder)
                fits = tuple(part.shape) == wanted
                if entry.kind == "vocabulary":
                    fits = part.shape[1:] == wanted[1:] and part.shape[0] * len(slices) >= self.architecture.vocab_size
                if not fits:
                    raise ValueError(f"{self.folder}: {entry.names[0]} has shape {tuple(part.shape)} on a rank, expected {wanted}")
        for seat, parameters in self._states.items():
            self._check_rank(seat, parameters)

    def _check_rank(self, seat: Seat, parameters: Mapping[Key, torch.Tensor]) -> None:
        """Nothing is left over on a rank, and its copy of a tied embedding is one."""
        stage = Stage(seat.pipeline, self.layout, seat.expert, self.architecture.num_experts)
        held = {key: entry for entry, key in stage.held(self.entries, parameters)}
        extra = sorted(set(parameters) - set(held))
        head = (0, "output_layer.weight")
        if self.architecture.tied_embeddings and self.layout.pipeline == 1 and head in extra:
            extra.remove(head)
            held[head] = self.entries[0]
        if extra:
            raise ValueError(f"{self.folder}: rank {tuple(seat)} has {[name for _, name in extra[:5]]} ({len(extra)} in all), "
                             f"which a {self.architecture.family} model has not")  # fmt: skip
        for (_, name), entry in held.items():
            if entry.stage == "both" and name.startswith("output_layer"):
                copy, tied = parameters[next(key for key in held if key[1] == name)], self._owners[entry][seat.tensor]
                if copy.shape != tied.shape or not torch.equal(copy.view(torch.uint8), tied.view(torch.uint8)):
                    raise ValueError(f"{self.folder}: {name} differs from the embedding it is tied to by config.json")

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._owners[entry][0].dtype

    def read(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        return merge(entry, self._owners[entry], self.architecture)

    def describe(self) -> list[str]:
        degrees = self.layout.describe().removesuffix(" DP=1")
        return [f"{degrees}, {len(self._states)} rank{'s' * (len(self._states) > 1)}"]


def _find(folder: Path) -> dict[tuple[int, ...], Path]:
    """The files by the numbers in their folders' names."""
    found = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(path.name)
        if match is None or not (path / FILE).is_file():
            raise ValueError(f"{path} is not what Megatron-LM makes: mp_rank_TT[_PPP][_EEE] with {FILE} in it")
        found[tuple(int(number) for number in match.groups() if number is not None)] = path / FILE
    if len({len(numbers) for numbers in found}) > 1:
        raise ValueError(f"{folder} holds files of several layouts: {', '.join(sorted(path.parent.name for path in found.values()))}")
    return found


def _seats(numbers: list[tuple[int, ...]], state: Mapping[str, Any], num_experts: int | None) -> dict[tuple[int, ...], Seat]:
    """Which rank each file is. One number after the tensor rank is a stage, or an expert rank if there is one stage only."""
    if len(numbers[0]) != 2:
        return {each: Seat(*each, *[0] * (3 - len(each))) for each in numbers}
    stages = getattr(state.get("args"), "pipeline_model_parallel_size", None)
    is_expert = num_experts is not None and (stages == 1 if stages is not None else _has_both_ends(state))
    return {each: Seat(each[0], 0, each[1]) if is_expert else Seat(each[0], each[1], 0) for each in numbers}


def _has_both_ends(state: Mapping[str, Any]) -> bool:
    names = state.get("model", {})
    return "embedding.word_embeddings.weight" in names and "decoder.final_layernorm.weight" in names


def _parameters(state: Mapping[str, Any], path: Path) -> dict[Key, torch.Tensor]:
    """A rank's parameters by chunk and name, without extra states."""
    virtual = 1 if "model" in state else sum(1 for key in state if re.fullmatch(r"model\d+", str(key)))
    keys = chunk_keys(virtual)
    if not virtual or not all(isinstance(state.get(key), Mapping) for key in keys):
        raise ValueError(f"{path} holds neither `model` nor `model0`, `model1`, ...; it has {sorted(map(str, state))[:8]}")
    return {
        (chunk, name): tensor
        for chunk, key in enumerate(keys)
        for name, tensor in state[key].items()
        if "_extra_state" not in name
    }


class _StandIn(SimpleNamespace):
    """What a class of Megatron-LM becomes."""

    def __init__(self, *values: Any) -> None:
        super().__init__(values=values)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_rank(path: Path) -> dict[str, Any]:
    """One rank's file, mapped; nothing in it is run.

    Raises:
        ValueError: it cannot be read, or holds code.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        bad = [name for name in names if name != "argparse.Namespace" and not name.startswith(_FOREIGN)]
        if bad:
            raise ValueError(f"{path} would run {', '.join(bad[:3])} when it is loaded; only tensors and plain values are taken")
        stand_ins = [(_StandIn, name) for name in names if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a rank's state")
    return state
