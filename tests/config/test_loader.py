from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_spice.config.describe import reference, resolved
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.keys import all_keys, nearest
from megatron_spice.config.loader import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def problems(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, list(overrides))
    return caught.value.problems


def test_overrides_have_the_types_of_yaml(write_recipe):
    config = load_config(
        write_recipe(),
        [
            "train.iterations=7",
            "policy.learning_rate=1e-6",
            "policy.precision=fp32",
            "game.answer_types=[String, Integer]",
            "rollout.verify_sync=false",
            "rollout.context_length=null",
            "game.verifier.timeout=0.5",
            "run.dir=some/where",
        ],
    )
    assert config.train.iterations == 7
    assert config.policy.learning_rate == 1e-6
    assert config.policy.precision == "fp32"
    assert config.game.answer_types == ["String", "Integer"]
    assert config.rollout.verify_sync is False
    assert config.rollout.context_length is None
    assert config.game.verifier.timeout == 0.5
    assert config.run.dir == Path("some/where")


def test_later_overrides_win(write_recipe):
    assert load_config(write_recipe(), ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_override_may_hold_equals_signs(write_recipe):
    assert load_config(write_recipe(), ["run.dir=runs/lr=1"]).run.dir == Path("runs/lr=1")


def test_an_empty_section_means_its_defaults(write_recipe):
    recipe = write_recipe(game={"verifier": None}, telemetry=None)
    recipe.write_text(recipe.read_text() + "train:\n")
    config = load_config(recipe)
    assert config.train.iterations == 640
    assert config.game.verifier.workers == 1


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.itertions=3", ["train.itertions=3", "unknown key", "train.iterations"]),
        ("policy.temperature=1", ["policy.temperature=1", "rollout.temperature"]),
        ("temperature=1", ["temperature=1", "rollout.temperature"]),
        ("gmae.attempts=3", ["gmae.attempts=3", "game.attempts"]),
        ("train.iterations=0", ["train.iterations=0", "whole number >= 1"]),
        ("train.iterations=2.5", ["train.iterations=2.5", "whole number >= 1"]),
        ("train.iterations=many", ["train.iterations=many", "whole number >= 1"]),
        ("train.iterations=yes", ["train.iterations=true", "whole number >= 1"]),
        ("train.iterations=", ["train.iterations=null", "whole number >= 1"]),
        ("rollout.top_p=1.5", ["rollout.top_p=1.5", "> 0 and <= 1"]),
        ("rollout.temperature=.inf", ["rollout.temperature=inf", "a number > 0"]),
        ("policy.learning_rate=.nan", ["policy.learning_rate=nan", "a number > 0"]),
        ("policy.precision=fp16", ["policy.precision=fp16", "one of fp32, bf16"]),
        ("corpus.weights={a: 0}", ["corpus.weights", "0", "a number > 0 for each label"]),
        ("corpus.weights={a: .nan}", ["corpus.weights", "nan", "a number > 0 for each label"]),
        ("corpus.weights.a=-1", ["corpus.weights", "-1", "a number > 0 for each label"]),
        ("corpus.weights={}", ["corpus.weights={}", "a number > 0 for each label"]),
        ("corpus.weights=0.5", ["corpus.weights=0.5", "a number > 0 for each label"]),
        ("game.answer_types=[Float]", ["game.answer_types", "Float", "MCQ"]),
        ("game.answer_types=[]", ["game.answer_types=[]", "non-empty"]),
        ("game.verifier=3", ["game.verifier=3", "section"]),
        ("game.verifier.timeout=-1", ["game.verifier.timeout=-1", "a number > 0"]),
        ("run.dir.x=1", ["run.dir.x=1", "run.dir is a single value"]),
        ("train.iterations", ["'train.iterations'", "key.sub=value"]),
        ("=3", ["'=3'", "key.sub=value"]),
        ("train.seed=[", ["train.seed=[", "not valid YAML"]),
    ],
)
def test_a_wrong_override_names_key_value_and_remedy(write_recipe, override, parts):
    found = problems(write_recipe(), override)
    assert len(found) == 1
    for part in parts:
        assert part in found[0]


def test_all_problems_are_told_at_once(write_recipe):
    found = problems(write_recipe(run=None, game={"group_size": 0}), "train.sed=1", "policy.precision=int4")
    text = "\n".join(found)
    assert len(found) == 4
    for key in ("run.dir", "game.group_size=0", "train.sed=1", "policy.precision=int4"):
        assert key in text


def test_a_missing_section_names_the_key_it_must_hold(write_recipe):
    (problem,) = problems(write_recipe(corpus=None))
    assert "corpus.path" in problem and "missing" in problem and "tools/preprocess_corpus.py" in problem


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run: {dir: a\ntrain: 3", ["line 2", "not valid YAML"]),
        ("run:\n  dir: a\n  dir: b\n", ["line 3", "'dir' is given twice"]),
        ("just words", ["sections", "just words"]),
        ("", ["sections"]),
    ],
)
def test_a_broken_file_says_where(write_recipe, text, parts):
    (problem,) = problems(write_recipe(text))
    for part in parts:
        assert part in problem


def test_a_recipe_that_is_not_there(tmp_path):
    (problem,) = problems(tmp_path / "nothing.yaml")
    assert "nothing.yaml" in problem and "examples/" in problem


def test_settings_cannot_be_changed_afterwards(write_recipe):
    config = load_config(write_recipe())
    with pytest.raises(ValueError, match="frozen"):
        config.train.iterations = 3


def test_the_resolved_recipe_reads_back_the_same(write_recipe, tmp_path):
    config = load_config(write_recipe(), ["policy.learning_rate=1e-6", "game.answer_types=[String]"])
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved(config))
    assert load_config(again) == config


def test_the_reference_holds_every_key_with_its_default():
    text = reference()
    for key in all_keys().values():
        assert f"  {key.name}\n" in text
        assert key.allowed.isascii() and "typing" not in key.allowed and "<" not in key.allowed.replace("<=", "").replace("< ", "")
    assert "default 1024. N: most Challenger attempts" in text


def test_every_setting_says_what_it_means():
    assert [key.name for key in all_keys().values() if not key.description] == []


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(recipe):
    assert load_config(recipe).train.iterations >= 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(sorted(all_keys())),
    value=st.one_of(st.integers(-5, 5), st.booleans(), st.none(), st.text("ab:[]{}#&*!|>'\"%@` \n,", max_size=6)),
)
def test_any_override_is_taken_or_refused_by_name(write_recipe, key, value):
    """No value leads to anything but a configuration or a ConfigError that names the key."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    try:
        load_config(write_recipe(), [f"{key}={text}"])
    except ConfigError as error:
        assert key in str(error)


@given(st.sampled_from(sorted(all_keys())), st.data())
def test_one_wrong_letter_still_finds_the_key(key, data):
    section, last = key.rsplit(".", 1)
    if len(last) < 6:
        return
    at = data.draw(st.integers(0, len(last) - 1))
    near = nearest(f"{section}.{last[:at]}{last[at + 1 :]}")
    assert near is not None
    assert near == key or near.rsplit(".", 1)[1] != last


def test_a_recipe_over_its_base_says_only_what_differs(write_recipe, tmp_path):
    base = write_recipe(train={"seed": 3, "passages": 7}, game={"group_size": 4, "verifier": {"timeout": 5}})
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    recipe = deeper / "ablation.yaml"
    recipe.write_text("base: ../recipe.yaml\ntrain: {passages: 2}\ngame:\n  verifier: {workers: 3}\ncheckpoint:\n")
    config, below = load_config(recipe, ["train.iterations=9"]), load_config(base)
    assert (config.train.seed, config.train.passages, config.train.iterations) == (3, 2, 9)
    assert (config.game.group_size, config.game.verifier.timeout, config.game.verifier.workers) == (4, 5, 3)
    assert config.policy == below.policy and config.checkpoint == below.checkpoint
    further = deeper / "further.yaml"
    further.write_text("base: ablation.yaml\ntrain: {seed: 4}\n")
    assert (load_config(further).train.seed, load_config(further).train.passages) == (4, 2)


def test_a_map_of_values_is_replaced_not_mixed(write_recipe, tmp_path):
    base = write_recipe()
    path = yaml.safe_load(base.read_text())["corpus"]["path"]
    write_recipe(corpus={"path": path, "weights": {"a": 0.5, "b": 0.5}})
    recipe = tmp_path / "one.yaml"
    recipe.write_text("base: recipe.yaml\ncorpus: {weights: {a: 1.0}}\n")
    assert load_config(recipe).corpus.weights == {"a": 1.0}
    assert str(load_config(recipe).corpus.path) == path


@pytest.mark.parametrize("text, words", [
    ("base: nowhere.yaml\n", ["base=nowhere.yaml", "is not there"]),
    ("base: [a, b]\n", ["base=", "is not a path"]),
    ("base: one.yaml\n", ["base=one.yaml", "leads back"]),
    ("base: recipe.yaml\ntrain: {iteration: 3}\n", ["train.iteration", "did you mean train.iterations"]),
])  # fmt: skip
def test_what_is_wrong_with_a_base_is_named(write_recipe, tmp_path, text, words):
    write_recipe()
    recipe = tmp_path / "one.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(recipe)
    assert all(word in str(error.value) for word in words), error.value
