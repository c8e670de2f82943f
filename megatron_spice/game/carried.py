"""A game that is to be played, perhaps begun in an earlier iteration, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_spice.game.journal import Entry
from megatron_spice.game.records import Completion, Passage


@dataclass(frozen=True, slots=True)
class Game:
    """One passage of the batch of iteration `begun`, at place `slot` of it.

    `said`: what engines have said in it so far; `seconds`: how long it has been played so far.
    """

    begun: int
    slot: int
    passage: Passage
    said: tuple[Entry, ...] = ()
    seconds: float = 0.0


def new_games(iteration: int, passages: Sequence[Passage]) -> list[Game]:
    """An iteration's batch, not begun yet."""
    return [Game(iteration, slot, passage) for slot, passage in enumerate(passages)]


def game_state(game: Game) -> dict[str, Any]:
    """The game as plain values. Its passage is its number in the corpus; a prompt of several requests is kept once."""
    prompts: dict[tuple[int, ...], int] = {}
    said = [
        {
            "prompt": prompts.setdefault(entry.prompt_ids, len(prompts)),
            "seed": entry.seed,
            "completions": [_completion_state(completion) for completion in entry.completions],
        }
        for entry in game.said
    ]
    return {
        "begun": game.begun,
        "slot": game.slot,
        "passage": game.passage.index,
        "seconds": game.seconds,
        "prompts": [list(prompt) for prompt in prompts],
        "said": said,
    }


def game_from_state(state: dict[str, Any], passage: Callable[[int], Passage]) -> Game:
    """The game of a `game_state`; `passage` gives a passage by its number."""
    prompts = [tuple(prompt) for prompt in state["prompts"]]
    said = [
        Entry(
            prompts[entry["prompt"]],
            entry["seed"],
            tuple(_completion(prompts[entry["prompt"]], completion) for completion in entry["completions"]),
        )
        for entry in state["said"]
    ]
    return Game(state["begun"], state["slot"], passage(state["passage"]), tuple(said), state["seconds"])


def _completion_state(completion: Completion) -> dict[str, Any]:
    return {
        "ids": list(completion.completion_ids),
        "logprobs": list(completion.logprobs),
        "finish": completion.finish,
        "text": completion.text,
        "weight_version": completion.weight_version,
        "earlier": [list(run) for run in completion.earlier],
    }


def _completion(prompt_ids: tuple[int, ...], state: dict[str, Any]) -> Completion:
    return Completion(
        prompt_ids,
        tuple(state["ids"]),
        tuple(state["logprobs"]),
        state["finish"],
        state["text"],
        state["weight_version"],
        tuple((version, count) for version, count in state["earlier"]),
    )
