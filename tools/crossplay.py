#!/usr/bin/env python3
"""Any checkpoint's Challenger against any checkpoint's Reasoner, on the same passages (the paper's figure 3).

    python tools/crossplay.py examples/quickstart.yaml OUT --passages 128 \\
      --challengers early=runs/a/checkpoints/iteration_0000008,late=runs/a/checkpoints/iteration_0000050 \\
      --reasoners early=runs/a/checkpoints/iteration_0000008,late=runs/a/checkpoints/iteration_0000050 [key.sub=value ...]

The recipe gives the rules, the corpus (and with policy.model its tokenizer) and the engine's settings; overrides go over it
(game.group_size: answers to a task). Models are Megatron checkpoints, Hugging Face folders, of whatever family, or URLs of SGLang
servers (key in SPICE_CHALLENGER_KEY). A server is asked in its model's tokens: give its tokenizer (--tokenizer qwen=FOLDER), unless
it is found where the server says, or is policy.model's, which is taken where both vocabularies have the same size. OUT gets
matrix.json, matrix.txt, matrix.png and all tasks and answers; the same command goes on where it was interrupted, if the models,
and the weights of servers, are still the same. Exit code 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice import machine  # noqa: E402
from megatron_spice.config.errors import ConfigError  # noqa: E402
from megatron_spice.config.loader import load_config  # noqa: E402
from megatron_spice.crossplay import matrix  # noqa: E402
from megatron_spice.crossplay.match import Match  # noqa: E402
from megatron_spice.crossplay.players import MODELS, Player, check, players, with_tokenizers  # noqa: E402
from megatron_spice.rollout.engine import EngineError  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays a match and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--challengers", required=True, metavar="[NAME=]MODEL,...")
    parser.add_argument("--reasoners", required=True, metavar="[NAME=]MODEL,...")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=FOLDER", help="of a server's model; may be repeated")
    parser.add_argument("--passages", type=int, default=128, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the passages and all choices [%(default)s]")
    parser.add_argument("--keep-models", action="store_true", help="keep the Hugging Face folders made from checkpoints")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        return _play(options)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"crossplay: {error}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"crossplay: {error}\nThe same command goes on from here", file=sys.stderr)
        return 1


def _play(options: argparse.Namespace) -> int:
    if options.passages < 1 or options.seed < 0:
        raise ValueError(f"--passages={options.passages} must be 1 or more, --seed={options.seed} 0 or more")
    config = load_config(options.recipe, options.overrides)
    challengers, reasoners = players(options.challengers), players(options.reasoners)
    everyone = with_tokenizers([*challengers, *reasoners], options.tokenizer)
    challengers, reasoners = everyone[: len(challengers)], everyone[len(challengers) :]
    _agree(everyone)
    if not (config.corpus.path / "manifest.json").is_file():
        raise ValueError(f"corpus.path={config.corpus.path} is no corpus; give corpus.path=... after the models")
    match = Match(config, options.output, options.passages, options.seed, machine.device(config.cluster.device))
    match.play(challengers, reasoners, lambda words: print(words, flush=True))
    found = matrix.matrix(match, challengers, reasoners)
    (options.output / "matrix.json").write_text(json.dumps(found, indent=1) + "\n")
    text = matrix.table(found)
    (options.output / "matrix.txt").write_text(text + "\n")
    matrix.draw(found, options.output / "matrix.png")
    if not options.keep_models:
        shutil.rmtree(options.output / MODELS, ignore_errors=True)
    print(text)
    return 0


def _agree(everyone: Sequence[Player]) -> None:
    """One name is one model."""
    for player in everyone:
        check(player)
        for other in everyone:
            if other.name == player.name and other.source != player.source:
                raise ValueError(f"{player.name} is {player.source} and {other.source}; give them different names")


if __name__ == "__main__":
    sys.exit(main())
