"""What a warm-up learns from: prompts and completions of accepted tasks and right answers, from an export of another run.

Challenger: passage -> the completion that stated a valid task. Reasoner: question -> an answer that was right. Prompts are made
by this run's own style; completions are text, so each role's are only good for the style that the role was asked in, and are
ended as that style ends them: by its stop string, or by the model's end of text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import Config
from megatron_spice.game.play import Wording
from megatron_spice.game.records import Passage, Task, Trajectory

if TYPE_CHECKING:
    import pyarrow as pa

    from megatron_spice.corpus.tokenizer import TextTokenizer

NEEDED = ("valid", "prompt_style", "answer_type", "question", "gold_answer", "passage", "completion", "right_answers")
REASONER_STYLE = "reasoner_prompt_style"
"""A column that older exports lack: there the Reasoner counts as asked like the Challenger."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of a file, of which only those asked for are made into tokens.

    `places`: (row, role) of each. The table is in memory, with the columns that are needed.
    """

    table: pa.Table
    places: tuple[tuple[int, str], ...]
    wording: Wording
    config: Config

    @classmethod
    def open(cls, config: Config, tokenizer: TextTokenizer) -> Pairs:
        """The pairs of `warmup.pairs` that this recipe can use.

        Raises:
            ConfigError: the file is no such data set, or has nothing for a role of `warmup.roles`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = config.warmup.pairs
        assert path is not None
        try:
            there = pq.read_schema(path).names
            if missing := [name for name in NEEDED if name not in there]:
                raise ConfigError(f"warmup.pairs={path} lacks the columns {', '.join(missing)}; it has {', '.join(there)}")
            more = [REASONER_STYLE] if REASONER_STYLE in there else []
            table = pq.read_table(path, columns=[*NEEDED, *more])
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"warmup.pairs={path} is no Parquet file that can be read: {error}") from error
        kinds = set(config.game.answer_types)
        told = [table[name].to_pylist() for name in ("valid", "answer_type", "right_answers")]
        tasks = [(row, right) for row, (valid, kind, right) in enumerate(zip(*told)) if valid and kind in kinds]
        asked = {"challenger": table["prompt_style"].to_pylist()}
        asked["reasoner"] = table[REASONER_STYLE].to_pylist() if more else asked["challenger"]
        ours = {role: [(row, right) for row, right in tasks if style[row] == config.game.prompt_style] for role, style in asked.items()}
        places = [(row, "challenger") for row, _ in ours["challenger"]] + [(row, "reasoner") for row, right in ours["reasoner"] if right]
        if not config.game.no_corpus:
            shown = table["passage"].is_valid().to_pylist()
            places = [(row, role) for row, role in places if role == "reasoner" or shown[row]]
        places = [place for place in places if place[1] in config.warmup.roles]
        for role in config.warmup.roles:
            if all(place[1] != role for place in places):
                raise ConfigError(
                    f"warmup.pairs={path} has nothing for the {role}: of {table.num_rows} rows {len(ours[role])} are valid tasks "
                    f"whose {role} was asked with game.prompt_style={config.game.prompt_style}, of a kind among game.answer_types; "
                    "leave the role out of warmup.roles, or export another run"
                )
        return cls(table, tuple(places), Wording.of(config.game.prompt_style, tokenizer), config)

    def batch(self, step: int) -> list[Trajectory]:
        """What step `step` (from 0) learns from: all pairs are used in an order drawn anew for each round, by `train.seed`."""
        size, count = self.config.warmup.batch, len(self.places)
        chosen: list[Trajectory] = []
        orders: dict[int, list[int]] = {}
        for place in range(step * size, (step + 1) * size):
            turn, within = divmod(place, count)
            if turn not in orders:
                orders[turn] = list(range(count))
                random.Random(f"{self.config.train.seed} warmup {turn}").shuffle(orders[turn])
            chosen.append(self.trajectory(*self.places[orders[turn][within]], place))
        return chosen

    def trajectory(self, row: int, role: str, draw: int = 0) -> Trajectory:
        """One pair as tokens; of several right answers one is drawn by `draw`."""
        found: dict[str, Any] = self.table.slice(row, 1).to_pylist()[0]
        style, tokenizer, game = self.wording.style, self.wording.tokenizer, self.config.game
        task = Task(found["question"], found["gold_answer"], found["answer_type"])
        if role == "challenger":
            passage = None if game.no_corpus else Passage(0, 0, "", (), found["passage"])
            prompt, text = style.challenger_prompt(passage, task.answer_type), found["completion"]
            stop, limit = style.challenger_stop, game.challenger_max_tokens
        else:
            text = random.Random(f"{self.config.train.seed} {row} {draw}").choice(found["right_answers"])
            prompt = style.reasoner_prompt(task)
            stop, limit = style.reasoner_stop, game.reasoner_max_tokens
        # Of several ids that end a text the last is the one that ends a turn in the chat formats of today.
        ids = tokenizer.encode(text + stop[0]) if stop else [*tokenizer.encode(text), tokenizer.stop_ids[-1]]
        ids = ids[:limit]
        return Trajectory(role, tuple(tokenizer.encode_prompt(prompt)), tuple(ids), (0.0,) * len(ids), 1.0, 1.0)
