"""Every recipe in examples/ is whole: it plans on the nodes that its name says, and fits eighty gigabytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from published_shapes import SHAPES, add_corpus, add_model

from megatron_spice import plan
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import Config
from megatron_spice.corpus.chat_template import ChatTemplate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = [path for path in sorted(EXAMPLES.glob("*.yaml")) if path.name != "quickstart.yaml"]
NAME = re.compile(r"(?P<model>.+)-(?P<nodes>\d+)n(?P<ranks>\d+)g-(?P<layout>[a-z0-9]+)-(?P<precision>bf16|fp8)\.yaml")


def planned(path: Path, folder: Path) -> tuple[re.Match, Config, str, list[str]]:
    """What a recipe's name says, its settings, and the plan for as many nodes: its text and what is in the way."""
    said = NAME.fullmatch(path.name)
    assert said, "recipes are named <model>-<nodes>n<ranks>g-<layout>-<precision>.yaml"
    model, corpus = add_model(folder / "model", said["model"]), add_corpus(folder / "corpus", said["model"])
    # A run.dir that is not on this machine, whose disk is not the cluster's.
    config = load_config(path, [f"policy.model={model}", f"corpus.path={corpus}", "run.dir=/not-mounted-here/run"])
    return said, config, *plan.describe(config, int(said["nodes"]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_fits_the_nodes_in_its_name(path, tmp_path):
    said, config, text, problems = planned(path, tmp_path)
    assert not problems, "\n".join(problems)
    assert config.cluster.ranks_per_node == int(said["ranks"]) and config.policy.precision == said["precision"]
    for degree, size in re.findall(r"(tp|pp|ep)(\d+)", said["layout"]):
        names = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "ep": "expert_parallel_size"}
        assert getattr(config.policy, names[degree]) == int(size)
    left = [float(number) for number in next(line for line in text.splitlines() if line.startswith("left")).split()[1:]]
    assert min(left) > 4, f"less than 4 GiB of 80 are left while training, syncing or playing:\n{text}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_saves_before_much_is_lost_and_says_what_that_takes(path, tmp_path):
    """An iteration of these takes minutes: one of two is saved, which takes less than a hundredth of it, and the size is the plan's."""
    said, config, text, _ = planned(path, tmp_path)
    names, *rows = text[text.index("\nnodes  ranks") + 1 :].splitlines()
    mine = next(dict(zip(names.split(), map(float, row.split()))) for row in rows if row.split()[0] == said["nodes"])
    assert config.checkpoint.every <= 2 and mine["save"] < 0.01 * mine["seconds"]
    size = float(re.search(r"# Checkpoints: ([\d.]+) GB", text)[1])
    told = {int(number) for number in re.findall(r"(\d+) GB", path.read_text().partition("checkpoint:")[2])}
    assert told == {round(size)}


def test_the_papers_models_and_what_goes_beyond_have_recipes():
    models = {NAME.fullmatch(path.name)["model"] for path in RECIPES}
    assert models == set(SHAPES)


def test_octothinkers_template_is_a_plain_conversation():
    template = ChatTemplate((EXAMPLES / "octothinker_chat_template.jinja").read_text(), {})
    before, after = template.wrapper("ignored")
    assert before.startswith("A conversation between User and Assistant.") and before.endswith("\nUser: ")
    assert after == "\nAssistant:"
