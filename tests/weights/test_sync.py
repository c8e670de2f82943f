"""After a sync the engine is the policy: the same greedy tokens as the exported weights; and damage on the way is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import FORKS, run_ranks
from small_models import add_tokenizer, make_model, some_trajectories


@pytest.mark.parametrize("family, tied, degrees, fresh", [
    ("llama", True, {"pipeline_parallel_size": 2}, True),  # ranks that are no copies of one process
    ("qwen3", False, {"tensor_parallel_size": 2}, False),
])  # fmt: skip
def test_the_engine_computes_what_was_exported(tmp_path, family, tied, degrees, fresh):
    model = add_tokenizer(make_model(tmp_path / "hf", family, tied))
    first, second = run_ranks(
        2, Path(__file__).with_name("on_ranks.py"), "train_and_sync", str(model), degrees, some_trajectories(), str(tmp_path),
        fresh=fresh or not FORKS,
    )
    assert first["version"] == "7"
    assert first["difference"] == second["difference"] < 1e-3

    from transformers import AutoModelForCausalLM

    exported, before = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "exported", model)
    )
    assert any(not torch.equal(a, b) for a, b in zip(exported.parameters(), before.parameters())), "nothing was trained"
    ids = torch.tensor([[10, 20, 30, 40]])
    expected = exported.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None)[0, 4:].tolist()
    assert list(first["greedy"]) == expected[: len(first["greedy"])] and len(first["greedy"]) >= 1

    for rank in (first, second):
        assert "were not sent" in rank["lost"]
        assert "engine of rank 0 differs from the policy" in rank["noticed"], "a corrupted bucket went unnoticed"
