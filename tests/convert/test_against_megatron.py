"""What we write Megatron-Core's own model loads, strictly, and what it saves we read, in both of its formats, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversions import to_hf, to_mp_rank, to_torch_dist
from hf_folders import assert_same_model, write_model
from ranks import run_ranks

RANKS = Path(__file__).with_name("megatron_ranks.py")
DENSE, MIXTURE = ("qwen2", {"tie_word_embeddings": True}), ("qwen3_moe", {})
LAYOUTS = {
    "tensor 2, pipeline 2, virtual 2": (DENSE, {"tensor": 2, "pipeline": 2, "virtual": 2}),
    "tensor 2, expert 2": (MIXTURE, {"tensor": 2, "expert": 2}),
    "pipeline 2, expert 2": (MIXTURE, {"pipeline": 2, "expert": 2}),
}

STACKING = [["stacked"], ["non_homogeneous_layers"]]
"""What Megatron is told that changes how it names layers; the first changes nothing. Both name a norm as its own layers do."""


@pytest.fixture(scope="module")
def taken_over(tmp_path_factory):
    """For each layout: Megatron's ranks loaded our files for each rank, and our torch_dist, and saved both formats."""
    folder = tmp_path_factory.mktemp("megatron")
    jobs, places = [], {}
    for number, (name, ((family, sizes), layout)) in enumerate(LAYOUTS.items()):
        here = folder / str(number)
        hf = write_model(here / "hf", family, **sizes)
        job = {"hf": str(hf), "layout": layout}
        ranks = to_mp_rank(hf, here / "ranks", **layout)
        jobs.append({**job, "ranks": str(ranks), "again": str(here / "again"), "dist": str(here / "dist")})
        jobs.append({**job, "from": str(to_torch_dist(hf, here / "ours")), "again": str(here / "from_dist")})
        places[name] = here
    # Experts that are not cut: tensor and expert ranks are not independent then.
    whole = folder / "whole"
    hf = write_model(whole / "hf", "qwen3_moe")
    ours = to_torch_dist(hf, whole / "ours")
    layout = {"tensor": 2, "expert": 2}
    jobs.append({"hf": str(hf), "layout": layout, "expert_tensor": 1, "from": str(ours), "again": str(whole / "from_dist")})
    places["whole experts"] = whole
    for keys in STACKING:
        place = folder / "-".join(keys)
        hf = write_model(place / "hf", "qwen3_moe")
        ranks = to_mp_rank(hf, place / "ranks", **layout)
        jobs.append({"hf": str(hf), "layout": layout, "ranks": str(ranks), "dist": str(place / "dist"), "metadata": keys})
        places["-".join(keys)] = place
    run_ranks(4, RANKS, "take_over", jobs)
    return places


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", ["again", "dist", "from_dist"])
def test_what_megatron_loaded_from_us_and_saved_is_what_we_wrote(taken_over, tmp_path, layout, saved):
    here = taken_over[layout]
    assert_same_model(here / "hf", to_hf(here / saved, tmp_path / "back", hf=here / "hf"))


def test_experts_that_are_not_cut(taken_over, tmp_path):
    here = taken_over["whole experts"]
    files = sorted(path.parent.name for path in here.glob("from_dist/iter_0000007/*/*.pt"))
    assert files == ["mp_rank_00_000", "mp_rank_01_001"]
    assert_same_model(here / "hf", to_hf(here / "from_dist", tmp_path / "back", hf=here / "hf"))


@pytest.mark.parametrize("keys", STACKING, ids="-".join)
def test_other_names_that_megatron_may_give_layers(taken_over, tmp_path, keys):
    here = taken_over["-".join(keys)]
    assert_same_model(here / "hf", to_hf(here / "dist", tmp_path / "back", hf=here / "hf"))
