"""Hugging Face -> Megatron -> Hugging Face gives every bit back, whatever the family, the sizes, the format and the layout."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from conversions import to_hf, to_mp_rank, to_torch_dist
from hf_folders import assert_same_model, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe"]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
few = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def models(draw, tensor: int = 1, chunks: int = 1, expert: int = 1):
    """(family, dtype, sizes, shards) of a small model, odd where the layout lets it be."""
    groups = tensor * draw(st.integers(1, 2))
    sizes = {
        "vocab_size": draw(st.integers(1, 300)), "hidden_size": draw(st.integers(1, 13)),
        "intermediate_size": tensor * draw(st.integers(1, 7)), "num_hidden_layers": chunks * draw(st.integers(1, 2)),
        "num_key_value_heads": groups, "num_attention_heads": groups * draw(st.integers(1, 3)), "head_dim": draw(st.integers(1, 7)),
        "num_experts": expert * draw(st.integers(2, 3)), "moe_intermediate_size": tensor * draw(st.integers(1, 5)),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    family = "qwen3_moe" if expert > 1 else draw(st.sampled_from(FAMILIES))
    return family, draw(st.sampled_from(DTYPES)), sizes, draw(st.integers(1, 3))


@few
@given(models())
def test_through_torch_dist(model):
    family, dtype, sizes, shards = model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_model(folder / "hf", family, dtype, shards, **sizes)
        back = to_hf(to_torch_dist(source, folder / "megatron"), folder / "back")
        assert_same_model(source, back)


LAYOUTS = [
    {}, {"tensor": 2}, {"tensor": 4}, {"tensor": 3}, {"pipeline": 2}, {"pipeline": 4}, {"pipeline": 2, "virtual": 2}, {"expert": 2},
    {"expert": 4},
    {"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2, "virtual": 3}, {"tensor": 2, "expert": 2}, {"pipeline": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2, "virtual": 2, "expert": 2},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_through_a_file_for_each_rank(layout, data):
    chunks = layout.get("pipeline", 1) * layout.get("virtual", 1)
    family, dtype, sizes, shards = data.draw(models(layout.get("tensor", 1), chunks, layout.get("expert", 1)))
    implementation = data.draw(st.sampled_from(["local", "transformer_engine"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_model(folder / "hf", family, dtype, shards, **sizes)
        ranks = to_mp_rank(source, folder / "ranks", implementation, **layout)
        files = list(ranks.glob("release/mp_rank_*/model_optim_rng.pt"))
        assert len(files) == layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("expert", 1)
        assert_same_model(source, to_hf(ranks, folder / "back", hf=source))


def test_from_one_megatron_format_to_the_other(tmp_path):
    source = write_model(tmp_path / "hf", "qwen3_moe")
    ranks = to_mp_rank(source, tmp_path / "ranks", tensor=2, pipeline=2)
    assert_same_model(source, to_hf(to_torch_dist(ranks, tmp_path / "dist", hf=source), tmp_path / "back"))
