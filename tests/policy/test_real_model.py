"""The quickstart's own model, when it has been fetched: its log-probabilities are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_models import import_transformers

MODEL = Path(__file__).resolve().parents[2] / "assets" / "smollm2-135m-instruct"


@pytest.mark.skipif(not MODEL.exists(), reason="needs assets/smollm2-135m-instruct: python examples/fetch_assets.py model ...")
def test_smollm2_is_transformers_smollm2():
    import_transformers()
    from transformers import AutoModelForCausalLM

    ids = [504, 3575, 282, 4649, 314, 7042, 30, 378, 13265, 28, 281, 216, 33, 40, 40, 41, 28, 436, 4168, 1029]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    jobs = [{"model": MODEL, "score": ids, "overrides": {"policy": {"pipeline_parallel_size": 2}}}]
    ours = run_ranks(2, Path(__file__).with_name("on_ranks.py"), "in_layouts", jobs)[0][0]["score"]
    assert (torch.tensor(ours) - expected).abs().max() < 1e-3
