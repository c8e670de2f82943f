"""Recipes in which another model than the policy writes the tasks: what contradicts itself is named before the start."""

from __future__ import annotations

import dataclasses

import pytest
from made_corpus import Document, make_corpus
from scripted_game import GHANA, CodePoints

from megatron_spice.challenger import check_context, context_needed, longest_passage
from megatron_spice.config.checks import check, check_challenger
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import GameConfig
from megatron_spice.corpus.manifest import Manifest
from megatron_spice.game.play import Wording

SERVED = {"challenger": {"engines": ["http://gpu9:30000"]}}


@pytest.mark.parametrize("sections, words", [
    ({"rollout": SERVED}, ["rollout.challenger.engines", "game.fixed_challenger=true"]),
    ({"rollout": {"challenger": {"prompt_style": "chat"}}}, ["rollout.challenger.prompt_style", "leave rollout.challenger out"]),
    ({"game": {"fixed_challenger": True}, "cluster": {"ranks_per_node": 2, "device": "cuda"}}, ["on CUDA", "rollout.challenger.engines"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"challenger": {"engines": ["gpu9"]}}}, ["gpu9 is not the address"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"engines": ["http://GPU9:30000/"], **SERVED}}, ["both name http://gpu9:30000"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"oversample": 1.5, **SERVED}}, ["rollout.oversample=1.5", "give rollout.oversample=1"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"challenger": {**SERVED["challenger"], "tokenizer": "nowhere"}}},
     ["rollout.challenger.tokenizer=nowhere", "tokenizer.json"]),
])  # fmt: skip
def test_what_cannot_be_is_named(write_recipe, sections, words):
    [problem] = check_challenger(load_config(write_recipe(**sections)))
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize("style", ["chat", "few_shot"])
@pytest.mark.parametrize("no_corpus", [False, True])
def test_a_strong_challenger_needs_room_for_the_longest_passage_the_instructions_and_the_completion(style, no_corpus):
    game = GameConfig(challenger_max_tokens=50, selection_max_tokens=1, no_corpus=no_corpus)
    asked = Wording.of(style, CodePoints())
    passage = None if no_corpus else GHANA
    prompts = [len(asked.tokenizer.encode_prompt(asked.style.challenger_prompt(passage, kind))) for kind in game.answer_types]
    assert context_needed(game, asked, 0 if no_corpus else len(GHANA.text)) == max(prompts) + 50
    chooses = game.model_copy(update={"selection_max_tokens": 5000})
    assert (context_needed(chooses, asked, 10) > 5000) == (style == "chat" and not no_corpus)


def test_a_context_that_the_longest_request_does_not_fit_is_refused_with_the_numbers(write_recipe, tmp_path):
    corpus = make_corpus(tmp_path / "cut", [Document("only", [1, 2, 3, 4, 5])])
    manifest = Manifest.read(corpus)
    dataclasses.replace(manifest, options={**manifest.options, "max_tokens": 77}).write(corpus)
    config = load_config(write_recipe(game={"prompt_style": "few_shot", "challenger_max_tokens": 50}), [f"corpus.path={corpus}"])
    asked = Wording.of("few_shot", CodePoints())
    needed = context_needed(config.game, asked, 77)
    check_context(config, asked, needed)
    with pytest.raises(ConfigError, match=f"has {needed} tokens .*up to 77.*=50 and {needed - 127} of instructions.*context {needed - 1};"):
        check_context(config, asked, needed - 1)


def test_servers_that_write_the_tasks_have_a_context_of_their_own(write_recipe):
    """The policy's limits only what the Reasoner writes."""
    game = {"fixed_challenger": True, "challenger_max_tokens": 4096, "reasoner_max_tokens": 512}
    recipe = write_recipe(game=game, rollout={"context_length": 2048})
    with pytest.raises(ConfigError, match="(?s)game.challenger_max_tokens=4096 leaves no room.*passages of up to 160 tokens"):
        check(load_config(recipe))
    served = "rollout.challenger.engines=['http://gpu9:30000']"
    check(load_config(recipe, [served]))
    with pytest.raises(ConfigError, match="game.reasoner_max_tokens=2048 leaves no room"):
        check(load_config(recipe, [served, "game.reasoner_max_tokens=2048"]))


def test_the_longest_passage_is_what_the_corpus_was_cut_to(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", [Document("only", [1, 2, 3, 4, 5])])
    manifest = Manifest.read(corpus)
    dataclasses.replace(manifest, options={**manifest.options, "max_tokens": 77}).write(corpus)
    assert longest_passage(corpus) == 77
    dataclasses.replace(manifest, options={}).write(corpus)
    assert longest_passage(corpus) == 0


@pytest.mark.parametrize("sections", [
    {}, {"game": {"fixed_challenger": True}}, {"game": {"fixed_challenger": True}, "rollout": SERVED},
    {"game": {"fixed_challenger": True}, "rollout": SERVED, "cluster": {"ranks_per_node": 2, "device": "cuda"}},
])  # fmt: skip
def test_what_can_be_is_let_pass(write_recipe, sections):
    assert check_challenger(load_config(write_recipe(**sections))) == []
