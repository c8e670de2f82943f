from __future__ import annotations

import json
import shutil

import pytest

from megatron_spice.config.checks import CORPUS_FORMAT, check
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.loader import load_config
from megatron_spice.corpus.manifest import FORMAT


def problems(recipe, *overrides: str, nodes: int = 1) -> list[str]:
    config = load_config(recipe, list(overrides))
    try:
        check(config, nodes)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(("tensor", "pipeline", "ranks"), [(1, 1, 1), (1, 2, 8), (3, 1, 3), (3, 2, 6), (1, 4, 4), (1, 30, 30)])
def test_layouts_that_fit(write_recipe, tensor, pipeline, ranks):
    sizes = [f"policy.tensor_parallel_size={tensor}", f"policy.pipeline_parallel_size={pipeline}"]
    assert problems(write_recipe(), *sizes, f"cluster.ranks_per_node={ranks}") == []


def test_a_servers_setting_that_only_the_other_device_lacks_is_let_pass(write_recipe):
    recipe = write_recipe()
    triton = "rollout.server={attention_backend: triton}"
    assert problems(recipe, triton) == [], "the device is open, and on CUDA it is free"
    with pytest.raises(ConfigError, match="rollout.server.attention_backend=triton is set by this program itself: leave it out"):
        check(load_config(recipe, [triton]), device="cpu")


def test_more_nodes_can_hold_what_one_cannot(write_recipe):
    override = "policy.pipeline_parallel_size=6"
    assert problems(write_recipe(), override, nodes=1)
    assert not problems(write_recipe(), override, nodes=3)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["policy.pipeline_parallel_size=3"],
            ["policy.pipeline_parallel_size=3", "= 3 does not divide the 2 ranks", "cluster.ranks_per_node=2", "[1, 2]"],
        ),
        (["rollout.deterministic=true", "rollout.oversample=1.5"], ["rollout.oversample=1.5", "give rollout.oversample=1"]),
        (["policy.optimizer_offload=0.5", "cluster.device=cpu"], ["policy.optimizer_offload=0.5", "give 0"]),
        (["policy.optimizer_offload=1", "policy.precision=fp32"], ["policy.optimizer_offload=1.0", "policy.precision=bf16"]),
        (["rollout.server={port: 30000}"], ["rollout.server.port=30000", "leave it out"]),
        (["rollout.server={attention_backend: triton}", "cluster.device=cpu"], ["rollout.server.attention_backend=triton"]),
        (["rollout.server={base_gpu_id: 1}", "cluster.device=cuda"], ["rollout.server.base_gpu_id=1"]),
        (["policy.tensor_parallel_size=2"], ["policy.tensor_parallel_size=2", "num_attention_heads=9", "[1, 3]"]),
        (
            ["policy.pipeline_parallel_size=32", "cluster.ranks_per_node=32"],
            ["policy.pipeline_parallel_size=32", "num_hidden_layers=30", "lower one of them"],
        ),
        (
            ["rollout.engines_per_node=3", "cluster.ranks_per_node=4"],
            ["rollout.engines_per_node=3", "cluster.ranks_per_node=4", "[1, 2, 4]"],
        ),
        (["rollout.engines=[10.0.0.1:30000]"], ["rollout.engines=10.0.0.1:30000", "http://HOST:PORT"]),
        (["rollout.engines=[http://gpu7]"], ["rollout.engines=http://gpu7", "http://HOST:PORT"]),
        (["rollout.engines=['http://gpu7:30000/v1']"], ["more than a host and a port"]),
        (["rollout.engines=['http://:secret@gpu7:30000']"], ["must hold no password", "SPICE_ENGINE_KEY"]),
        (["rollout.engines=['http://a:1','http://b:2','http://A:1/']"], ["http://a:1 more than once"]),
        (["rollout.engines=['http://a:1']", "rollout.engines_per_node=2"], ["rollout.engines_per_node=2", "rollout.engines"]),
        (["rollout.engines=['http://a:1']", "rollout.tensor_parallel_size=2"], ["rollout.tensor_parallel_size=2"]),
        (["rollout.engines=['http://a:1']", "rollout.router=b:2"], ["rollout.router=b:2", "http://HOST:PORT"]),
        (
            ["rollout.engines=['http://a:1']", "rollout.router=http://b:2", "rollout.oversample=1.5"],
            ["rollout.oversample=1.5", "rollout.router=http://b:2", "leave rollout.router out"],
        ),
        (["rollout.router=http://b:2"], ["rollout.router=http://b:2", "rollout.engines"]),
        (["rollout.tensor_parallel_size=3"], ["rollout.tensor_parallel_size=3", "cluster.ranks_per_node=2"]),
        (["game.attempts=4"], ["game.attempts=4", "game.group_size=8"]),
        (["game.group_size=1"], ["game.group_size=1"]),
        (["train.optimizer_steps=4096"], ["train.optimizer_steps=4096", "256 groups"]),
        (["policy.dual_clip=3"], ["policy.dual_clip=3 ", "train.optimizer_steps=1", "2 or more"]),
        (["rollout.context_length=9000"], ["rollout.context_length=9000", "max_position_embeddings=8192"]),
        (["game.reasoner_max_tokens=8192"], ["game.reasoner_max_tokens=8192", "context of 8192"]),
        (
            ["rollout.context_length=4200", "game.challenger_max_tokens=4096"],
            ["passages of up to 160 tokens", "game.challenger_max_tokens=4096", "context of 4200", "8192"],
        ),
        (["corpus.path=not/there"], ["corpus.path=not/there", "preprocess_corpus.py TEXTS.jsonl --tokenizer", "--output not/there`"]),
        (
            ["corpus.path=not/there", "corpus.weights={web: 1, my texts: 2}"],
            ["preprocess_corpus.py WEB.jsonl 'MY TEXTS.jsonl' --source web --source 'my texts' --tokenizer"],
        ),
        (["policy.model=not/there"], ["policy.model=not/there", "convert_checkpoint.py"]),
    ],
)
def test_what_does_not_go_together_names_both_sides(write_recipe, overrides, parts):
    found = problems(write_recipe(), *overrides)
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


def test_the_run_folder_must_not_be_a_file(write_recipe, tmp_path):
    (tmp_path / "run").write_text("")
    (problem,) = problems(write_recipe())
    assert "run.dir=" in problem and "is a file" in problem


def test_a_corpus_of_another_tokenizer_is_noticed(write_recipe, tmp_path):
    recipe = write_recipe()
    manifest = {"tokenizer": {"vocab_size": 151936}, "options": {"max_tokens": 160}}
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = problems(recipe)
    assert "151936" in problem and "49152" in problem


def test_a_corpus_of_another_format_is_noticed(write_recipe, tmp_path):
    recipe = write_recipe()
    manifest = {"tokenizer": {"vocab_size": 49152}, "options": {"max_tokens": 160}, "format": 1, "command": ["tool", "a b"]}
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = problems(recipe)
    assert "format 1, this version reads 2" in problem and "again with: tool 'a b'" in problem
    assert CORPUS_FORMAT == FORMAT


@pytest.mark.parametrize(("files", "overrides", "has_one"), [
    ({}, [], False),
    ({"chat_template.jinja": "{{ messages }}"}, [], True),
    ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, [], True),
    ({"tokenizer_config.json": '{"chat_template": [{"name": "tool_use", "template": "{{ tools }}"}]}'}, [], False),
    ({"tokenizer_config.json": '{"chat_template": null}'}, [], False),
    ({}, ["game.prompt_style=few_shot"], True),
])  # fmt: skip
@pytest.mark.parametrize("place", ["model", "model/hf"])
def test_a_model_that_is_asked_by_chat_needs_a_template(write_recipe, tmp_path, place, files, overrides, has_one):
    """Base models have none, and every rank of a run would find that out for itself."""
    recipe = write_recipe()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").rename(tmp_path / place / "config.json")
    for name, text in files.items():
        (tmp_path / place / name).write_text(text)
    found = problems(recipe, *overrides)
    assert not found if has_one else len(found) == 1 and f"policy.model={tmp_path / 'model'} has no chat template" in found[0], found
    if not has_one:
        assert str(tmp_path / place) in found[0] and "game.prompt_style=few_shot" in found[0]


def test_a_chat_template_that_cannot_be_read_is_noticed(write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "model" / "tokenizer_config.json").write_text("{")
    [problem] = problems(recipe)
    assert "policy.model=" in problem and "cannot be read (JSONDecodeError" in problem


def test_servers_that_write_the_tasks_by_chat_need_a_template_too(write_recipe, tmp_path):
    """Theirs, or the policy's where it is lent to them."""
    served = {"engines": ["http://gpu9:30000"], "prompt_style": "chat"}
    recipe = write_recipe(game={"prompt_style": "few_shot", "fixed_challenger": True}, rollout={"challenger": served})
    assert problems(recipe) == []
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    [problem] = problems(recipe)
    assert problem.startswith(f"policy.model={tmp_path / 'model'}") and "rollout.challenger.prompt_style=few_shot" in problem
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokenizer.json").touch()
    given = f"rollout.challenger.tokenizer={tmp_path / 'theirs'}"
    [problem] = problems(recipe, given)
    assert problem.startswith(f"{given} has no chat template")
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    assert problems(recipe, given) == []


@pytest.mark.parametrize("there", [True, False])
def test_dali_must_be_there_where_it_is_asked_for(write_recipe, monkeypatch, there):
    monkeypatch.setattr("megatron_spice.config.checks._is_installed", lambda module: there)
    found = problems(write_recipe(), "corpus.loader=dali")
    assert found == [] if there else "constraints.txt nvidia-dali" in found[0] and "corpus.loader=mmap" in found[0]


def test_weights_are_for_sources_that_the_corpus_has(write_recipe, tmp_path):
    recipe = write_recipe(corpus={"path": str(tmp_path / "corpus"), "weights": {"mathematics": 1, "genral": 1, "empty": 2}})
    sources = [{"name": name, "passages": count} for name, count in (("mathematics", 7), ("general", 3000), ("empty", 0))]
    manifest = {"tokenizer": {"vocab_size": 49152}, "options": {"max_tokens": 160}, "sources": sources}
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    second, first = problems(recipe)  # in the order of the recipe
    assert "source genral" in first and "mathematics (7), general (3,000), empty (0)" in first
    assert "source empty" in second


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"tokenizer": 3}'])
def test_a_folder_that_is_no_corpus_is_noticed(write_recipe, tmp_path, content):
    recipe = write_recipe()
    path = tmp_path / "corpus" / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    (problem,) = problems(recipe)
    assert "manifest.json" in problem and "tools/preprocess_corpus.py" in problem


def test_everything_missing_is_told_at_once(write_recipe, tmp_path):
    recipe = write_recipe()
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "corpus")
    assert len(problems(recipe, "game.attempts=2", "policy.tensor_parallel_size=4")) == 4
