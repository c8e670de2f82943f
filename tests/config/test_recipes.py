"""Every recipe in examples/ is whole: it plans on the nodes that its name says, and fits eighty gigabytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from published_shapes import SHAPES, add_corpus, add_model

from megatron_spice import plan
from megatron_spice.config.loader import load_config
from megatron_spice.corpus.chat_template import ChatTemplate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = [path for path in sorted(EXAMPLES.glob("*.yaml")) if path.name != "quickstart.yaml"]
NAME = re.compile(r"(?P<model>.+)-(?P<nodes>\d+)n(?P<ranks>\d+)g-(?P<layout>[a-z0-9]+)-(?P<precision>bf16|fp8)\.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_fits_the_nodes_in_its_name(path, tmp_path):
    said = NAME.fullmatch(path.name)
    assert said, "recipes are named <model>-<nodes>n<ranks>g-<layout>-<precision>.yaml"
    model, corpus = add_model(tmp_path / "model", said["model"]), add_corpus(tmp_path / "corpus", said["model"])
    # A run.dir that is not on this machine, whose disk is not the cluster's.
    config = load_config(path, [f"policy.model={model}", f"corpus.path={corpus}", "run.dir=/not-mounted-here/run"])
    text, problems = plan.describe(config, int(said["nodes"]))
    assert not problems, "\n".join(problems)
    assert config.cluster.ranks_per_node == int(said["ranks"]) and config.policy.precision == said["precision"]
    for degree, size in re.findall(r"(tp|pp|ep)(\d+)", said["layout"]):
        names = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "ep": "expert_parallel_size"}
        assert getattr(config.policy, names[degree]) == int(size)
    left = [float(number) for number in next(line for line in text.splitlines() if line.startswith("left")).split()[1:]]
    assert min(left) > 4, f"less than 4 GiB of 80 are left while training, syncing or playing:\n{text}"


def test_the_papers_models_and_what_goes_beyond_have_recipes():
    models = {NAME.fullmatch(path.name)["model"] for path in RECIPES}
    assert models == set(SHAPES)


def test_octothinkers_template_is_a_plain_conversation():
    template = ChatTemplate((EXAMPLES / "octothinker_chat_template.jinja").read_text(), {})
    before, after = template.wrapper("ignored")
    assert before.startswith("A conversation between User and Assistant.") and before.endswith("\nUser: ")
    assert after == "\nAssistant:"
