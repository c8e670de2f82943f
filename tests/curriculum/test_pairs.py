"""What a warm-up learns from: this run's own prompts, completions that end as the engine would end them, and clear refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curriculum_log import write_run
from tiny_tokenizer import write_tokenizer

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import Config
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.curriculum.export import Wanted, export
from megatron_spice.curriculum.pairs import Pairs
from megatron_spice.curriculum.rows import Run
from megatron_spice.game.records import Passage


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    run = write_run(folder / "run", " y?\nAnswer: 8", "How many y?", " 8", 5)
    export(Run.open(run), folder / "pairs.parquet", Wanted())
    return folder / "pairs.parquet"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}U: {{ message.content }}\n{% endfor %}A:")
    return TextTokenizer.from_dir(folder)


def config(data: Path, game: dict | None = None, **warmup: object) -> Config:
    return Config.model_validate({
        "run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"}, "policy": {"model": "/nowhere"},
        "game": {"prompt_style": "few_shot", "answer_types": ["Integer"], **(game or {})},
        "warmup": {"pairs": data, **warmup},
    })  # fmt: skip


def test_each_role_is_taught_what_it_would_have_said(data, tokenizer):
    pairs = Pairs.open(config(data), tokenizer)
    assert Counter(role for _, role in pairs.places) == {"challenger": 5, "reasoner": 5}
    challenger, reasoner = pairs.trajectory(2, "challenger"), pairs.trajectory(2, "reasoner")
    style = pairs.wording.style
    passage = Passage(0, 0, "", (), "Passage number 2.")
    assert list(challenger.prompt_ids) == tokenizer.encode_prompt(style.challenger_prompt(passage, "Integer"))
    assert tokenizer.decode(challenger.completion_ids) == " y?\nAnswer: 8\n\n"
    assert tokenizer.decode(reasoner.completion_ids) == " 8\n"
    assert "Passage" not in tokenizer.decode(reasoner.prompt_ids) and "How many y?" in tokenizer.decode(reasoner.prompt_ids)


def test_every_pair_is_used_once_a_round_in_an_order_of_its_own(data, tokenizer):
    pairs = Pairs.open(config(data, batch=5), tokenizer)
    rounds = [[*pairs.batch(2 * turn), *pairs.batch(2 * turn + 1)] for turn in range(2)]
    everything = Counter((each.role, each.prompt_ids) for each in rounds[0])
    assert everything == Counter((each.role, each.prompt_ids) for each in rounds[1])
    assert len(everything) == 6, "five passages, and one question five times"
    assert rounds[0] != rounds[1] and rounds[0] == [*pairs.batch(0), *pairs.batch(1)]


def test_a_completion_is_no_longer_than_the_game_allows(data, tokenizer):
    pairs = Pairs.open(config(data, {"challenger_max_tokens": 3, "reasoner_max_tokens": 1}), tokenizer)
    assert {len(pairs.trajectory(0, role).completion_ids) for role in ("challenger", "reasoner")} == {3, 1}


def test_a_roles_completions_are_good_for_the_style_that_it_was_asked_in(tmp_path, tokenizer):
    styles = {"prompt_style": "chat", "reasoner_prompt_style": "few_shot"}
    export(Run.open(write_run(tmp_path / "run", "{}", "How many y?", " 8", 3, **styles)), tmp_path / "pairs.parquet", Wanted())
    pairs = Pairs.open(config(tmp_path / "pairs.parquet", roles=["reasoner"]), tokenizer)
    assert pairs.places == ((0, "reasoner"), (1, "reasoner"), (2, "reasoner"))
    with pytest.raises(ConfigError, match="nothing for the challenger: of 3 rows 0 are .* game.prompt_style=few_shot"):
        Pairs.open(config(tmp_path / "pairs.parquet"), tokenizer)
    pairs = Pairs.open(config(tmp_path / "pairs.parquet", {"prompt_style": "chat"}, roles=["challenger"]), tokenizer)
    assert pairs.places == ((0, "challenger"), (1, "challenger"), (2, "challenger"))
    with pytest.raises(ConfigError, match="nothing for the reasoner: of 3 rows 0 are"):
        Pairs.open(config(tmp_path / "pairs.parquet", {"prompt_style": "chat"}, roles=["reasoner"]), tokenizer)


def test_an_export_without_the_reasoners_style_is_taken_as_the_challengers(data, tmp_path, tokenizer):
    pq.write_table(pq.read_table(data).drop_columns("reasoner_prompt_style"), tmp_path / "older.parquet")
    pairs = Pairs.open(config(tmp_path / "older.parquet"), tokenizer)
    assert Counter(role for _, role in pairs.places) == {"challenger": 5, "reasoner": 5}


@pytest.mark.parametrize(("game", "warmup", "words"), [
    ({"answer_types": ["String"]}, {}, ["nothing for the challenger", "game.answer_types"]),
    ({"prompt_style": "chat"}, {"roles": ["reasoner"]}, ["nothing for the reasoner", "game.prompt_style=chat"]),
])  # fmt: skip
def test_what_cannot_be_learned_from_is_named(data, tokenizer, game, warmup, words):
    with pytest.raises(ConfigError) as error:
        Pairs.open(config(data, game, **warmup), tokenizer)
    assert all(word in str(error.value) for word in words), error.value


def test_other_files_are_named(tmp_path, tokenizer):
    (tmp_path / "text").write_text("no table")
    with pytest.raises(ConfigError, match="no Parquet file"):
        Pairs.open(config(tmp_path / "text"), tokenizer)
    pq.write_table(pa.table({"question": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="lacks the columns valid, prompt_style"):
        Pairs.open(config(tmp_path / "other.parquet"), tokenizer)
