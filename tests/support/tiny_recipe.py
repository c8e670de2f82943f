"""A recipe of the main job that runs in seconds: a tiny random model with a real tokenizer, and a corpus made for it."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from small_models import TEXT, add_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[2]


def tiny_recipe(folder: Path) -> Path:
    """Puts the model (`hf`), the corpus (`corpus`) and the recipe into `folder`; two ranks, pipeline parallel."""
    shutil.copytree(_model_and_corpus().name, folder, dirs_exist_ok=True)
    model = folder / "hf"
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({
        "run": {"dir": str(folder / "unused")}, "corpus": {"path": str(folder / "corpus")},
        "train": {"iterations": 4, "passages": 3, "seed": 5},
        "game": {"prompt_style": "few_shot", "answer_types": ["Integer"], "attempts": 4, "group_size": 2,
                 "attempt_chunk": 2, "challenger_max_tokens": 6, "reasoner_max_tokens": 4},
        "rollout": {"max_total_tokens": 4096, "context_length": 1024, "max_running_requests": 8},
        "policy": {"model": str(model), "pipeline_parallel_size": 2, "precision": "fp32"},
        "checkpoint": {"every": 2}, "cluster": {"ranks_per_node": 2, "timeout": 120},
    }))  # fmt: skip
    return path


@functools.cache
def _model_and_corpus() -> tempfile.TemporaryDirectory[str]:
    """Made once, which takes seconds, for all that copy them."""
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    model = add_tokenizer(make_model(folder / "hf", "llama", tied=True))
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{number}. {TEXT * 3}", "id": str(number)}) + "\n" for number in range(40)))
    tool("preprocess_corpus", texts, "--tokenizer", model, "--output", folder / "corpus", "--max-tokens", 40, "--min-tokens", 10)
    # The model's context of 256 positions is less than the prompts of byte-sized tokens need.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return made


def tool(name: str, *arguments: object) -> None:
    """Runs one of tools/, which must succeed."""
    subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)], check=True, timeout=120)
