"""Every Challenger against every Reasoner, on the same passages [paper, figure 3].

    tasks-NAME.jsonl      one line a passage: the task that this Challenger wrote, null where none of its attempts was valid
    answers-NAME.jsonl    one line a Challenger and passage: which of this Reasoner's answers were right
    models.json           which model each NAME is

Each Challenger writes its tasks once, so that Reasoners meet the same ones; each model is started once for each part it plays,
one after the other. Lines are written as they come and not asked for again: a match that was interrupted goes on. What an engine
refuses (it may be too long for that model) is noted with the refusal: a passage without a task, a task without answers. The paper
samples 128 attempts for each of 128 documents and does not say which tasks are then asked: here one valid one a passage, drawn
at random, as in training.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_spice.config.hf import hugging_face_folder
from megatron_spice.config.schema import Config
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.sampler import PassageSampler
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.crossplay.players import Player, served
from megatron_spice.crossplay.session import note, noted, refusal, session
from megatron_spice.game.play import Table, answer_task, write_tasks
from megatron_spice.game.records import Passage, Task
from megatron_spice.rollout.engine import Engine, EngineRefused

SETTINGS = "match.json"
NAMES = "models.json"


class Match:
    """One match, whose results are in `folder`.

    Args:
        config: the game's rules, the corpus, how engines are set up; `game.group_size` is the number of answers to a task.
        passages: so many are drawn, with replacement, from `seed`.

    Raises:
        ValueError: `folder` holds a match of other rules.
    """

    def __init__(self, config: Config, folder: Path, passages: int, seed: int, device: str) -> None:
        self._config = config
        self._folder = folder
        self._count = passages
        self._seed = seed
        self._device = device
        folder.mkdir(parents=True, exist_ok=True)
        rules = {
            "game": config.game.model_dump(mode="json"), "corpus": config.corpus.model_dump(mode="json"),
            "temperature": config.rollout.temperature, "top_p": config.rollout.top_p, "passages": passages, "seed": seed,
        }  # fmt: skip
        path = folder / SETTINGS
        if path.exists() and json.loads(path.read_text()) != rules:
            raise ValueError(f"{folder} holds a match of other rules ({path}); name another folder, or remove it")
        path.write_text(json.dumps(rules, indent=1))

    def play(self, challengers: Sequence[Player], reasoners: Sequence[Player], say: Callable[[str], None]) -> None:
        """Plays what is missing.

        Raises:
            ValueError: a name stood for another model when a part of this match was played; or the corpus cannot be read.
            EngineError, ConfigError: see `served`.
        """
        busy = [player for player in challengers if self._missing_tasks(player)]
        corpus = self._corpus() if busy else None
        self._bind([*challengers, *reasoners], {*(reasoners if busy else ()), *busy} | {
            player for player in reasoners if self._missing_answers(player, challengers)
        }, say)  # fmt: skip
        with ExitStack() as stack:
            current: list[Any] = [None, None]

            def turn(player: Player) -> tuple[Engine, TextTokenizer]:
                if current[0] != player:
                    stack.close()
                    current[1] = stack.enter_context(served(player, self._config, self._folder, self._device))
                    current[0] = player
                return current[1]

            for player in busy:
                missing = self._missing_tasks(player)
                say(f"{player.name} writes {len(missing)} tasks")
                items = list(zip(missing, self._passages(corpus, missing)))
                self._run(*turn(player), items, partial(self._write, player))
            for player in sorted(reasoners, key=lambda player: player != current[0]):
                if missing := self._missing_answers(player, challengers):
                    say(f"{player.name} answers {len(missing)} tasks")
                    self._run(*turn(player), [(line["slot"], line) for line in missing], partial(self._answer, player))

    def _bind(self, everyone: Sequence[Player], busy: Collection[Player], say: Callable[[str], None]) -> None:
        """Notes which models the names stand for: lines are kept by name, and those of one model are no other's.

        A server that has nothing left to do is not asked: it need not be there any more, and may serve another model by now.
        """
        path = self._folder / NAMES
        bound = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for player in dict.fromkeys(everyone):
            known = bound.get(player.name, "")
            if player not in busy and player.is_at(known):
                say(f"{player.name} is not asked again: what it had to play has been played, by {known}")
                continue
            identity = player.identity(self._config)
            if bound.setdefault(player.name, identity) != identity:
                raise ValueError(
                    f"{player.name} is {identity}, but {known} has played under this name in {self._folder}; give the model "
                    f"another name ({player.name}-2={player.source}), or the match another folder"
                )
        path.write_text(json.dumps(bound, indent=1) + "\n", encoding="utf-8")

    def tasks(self, player: Player) -> list[dict[str, Any]]:
        """What a Challenger has written so far, by slot."""
        return sorted(noted(self._folder / f"tasks-{player.name}.jsonl"), key=lambda line: line["slot"])

    def answers(self, player: Player) -> list[dict[str, Any]]:
        """What a Reasoner has answered so far."""
        return noted(self._folder / f"answers-{player.name}.jsonl")

    def _run(self, engine: Engine, tokenizer: TextTokenizer, items: Sequence[Any], work: Callable[..., Any]) -> None:
        asyncio.run(session(self._config, engine, tokenizer, self._seed, items, work))

    def _corpus(self) -> Corpus:
        """Read with the tokenizer that it was made with, as in training, whatever the players' are: they are told its texts."""
        return Corpus(self._config.corpus.path, TextTokenizer.from_dir(hugging_face_folder(self._config.policy.model)))

    def _passages(self, corpus: Corpus, slots: Sequence[int]) -> list[Passage]:
        """The passages of these slots, the same for every Challenger."""
        sampler = PassageSampler(corpus, self._seed, self._config.corpus.weights)
        return corpus.passages([sampler.index_at(slot) for slot in slots])

    def _missing_tasks(self, player: Player) -> list[int]:
        there = {line["slot"] for line in self.tasks(player)}
        return [slot for slot in range(self._count) if slot not in there]

    def _missing_answers(self, player: Player, challengers: Sequence[Player]) -> list[dict[str, Any]]:
        there = {(line["challenger"], line["slot"]) for line in self.answers(player)}
        return [
            {**line, "challenger": challenger.name}
            for challenger in challengers
            for line in self.tasks(challenger)
            if line["task"] is not None and (challenger.name, line["slot"]) not in there
        ]

    async def _write(self, player: Player, table: Table, passage: Passage) -> None:
        path = self._folder / f"tasks-{player.name}.jsonl"
        about = {"slot": table.seeds[2], "passage": passage.index, "document": passage.document, "source": passage.source}
        try:
            answer_type, attempts, _ = await write_tasks(table, passage)
        except EngineRefused as error:
            note(path, about | {"attempts": 0, "valid": 0, "task": None, "refused": refusal(error)})
            return
        valid = [attempt for attempt in attempts if attempt.task is not None]
        task = table.random("task").choice(valid).task if valid else None
        note(path, about | {
            "answer_type": answer_type, "attempts": len(attempts), "valid": len(valid), "task": task and _plain(task),
        })  # fmt: skip

    async def _answer(self, player: Player, table: Table, line: dict[str, Any]) -> None:
        path, about = self._folder / f"answers-{player.name}.jsonl", {"challenger": line["challenger"], "slot": line["slot"]}
        try:
            answers = await answer_task(table, Task(**line["task"]), 0)
        except EngineRefused as error:
            note(path, about | {"correct": [], "refused": refusal(error)})
            return
        note(path, about | {
            "correct": [answer.verdict.correct for answer in answers], "extracted": [answer.verdict.extracted for answer in answers],
        })  # fmt: skip


def _plain(task: Task) -> dict[str, str]:
    return {"question": task.question, "gold_answer": task.gold_answer, "answer_type": task.answer_type}
