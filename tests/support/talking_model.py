"""A tiny model whose weights are set so that it can say one question and two answers: tasks are valid, and sometimes met."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from small_models import add_tokenizer, make_model
from tokenizers import Tokenizer


def talking_model(folder: Path) -> Path:
    """A model that goes on after `How many` with `?`, a new line and `Answer:8` or `Answer:7`, after `Answer:` likewise.

    Embedding and output matrix alone say what follows what; the random layers add noise to it, and get gradients.
    """
    add_tokenizer(make_model(folder, "llama", tied=False, max_position_embeddings=2048))
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    *said, colon, eight = tokens.encode("y?\nAnswer:8").ids
    [seven], end = tokens.encode("7").ids, tokens.token_to_id("<|im_end|>")
    followers = {**dict(zip(said, [*said[1:], colon])), colon: eight, eight: end}
    weights = load_file(folder / "model.safetensors")
    heard, spoken = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    spoken.zero_()
    for place, (token, follower) in enumerate(followers.items()):
        heard[token] = 0.0
        heard[token, place] = 64.0
        spoken[follower, place] = 2.5
    heard[seven], spoken[seven] = heard[eight], spoken[eight]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
