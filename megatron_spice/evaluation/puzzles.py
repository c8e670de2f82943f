"""Questions of the package reasoning-gym: made by programs from a seed, so they need no file and no model has seen them.

The question and its answer are the package's; asking, extraction and verdict are training's, like everywhere. Its tasks whose
answers are numbers or a few words suit that; those whose many right answers its own scorers accept would be graded too low,
and are refused where that shows (no answer is given).
"""

from __future__ import annotations

from megatron_spice.config.errors import PIP_INSTALL
from megatron_spice.evaluation.gold import task_of
from megatron_spice.evaluation.items import Item
from megatron_spice.evaluation.tasks import PUZZLES
from megatron_spice.game.records import Task

SIZE = 100
SEED = 20_251_028
"""Fixed, and unlike the seeds of examples; the same questions for everybody."""
# Made easier than the package's default, which a model of 135M parameters answers never.
SETTINGS = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "letter_counting": {"max_words": 8},
    "products": {"max_terms": 2, "max_digits": 2},
}


def puzzles(name: str, size: int = SIZE) -> list[Item]:
    """`size` items of `reasoning-gym/NAME`.

    Raises:
        ValueError: the package is missing, has no such task, or the task has no single answer.
    """
    short = name.removeprefix(PUZZLES)
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ValueError(
            f"{name} needs the package reasoning-gym: {PIP_INSTALL} -r requirements/evaluation.txt"
        ) from None
    if short not in DATASETS:
        raise ValueError(f"{name}: reasoning-gym has no task {short!r}; it has {', '.join(sorted(DATASETS))}")
    made = reasoning_gym.create_dataset(short, size=size, seed=SEED, **SETTINGS.get(short, {}))
    items = []
    for number, entry in enumerate(made, 1):
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise ValueError(f"{name} has no single right answer to compare with (question {number}); take another task")
        gold, answer_type = task_of(entry["answer"], "text")
        items.append(Item(str(number), Task(entry["question"].strip(), gold, answer_type)))
    return items
