"""Episodes packed into a page: as small JSON, gzip, base64, no more of them than fit.

A page that is mailed or opened on a phone must stay small, and a run may have played any number of episodes. What fits is
taken evenly over the iterations; the page says how many it has of how many. Base64 has no character that means anything in
HTML, so that no text of a model can end the element it lies in.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
from dataclasses import dataclass

from megatron_spice.report.episode_file import EpisodeFile, dicts

LONGEST_PASSAGE = 6000  # characters
LONGEST_TEXT = 2000
FIRST_GUESS = 64  # episodes compressed to learn how well they do
MOST_TRIES = 8


@dataclass(frozen=True)
class Payload:
    """`text` is base64 of gzip of a JSON list of episodes as `pack` gives them."""

    text: str
    episodes: int
    of: int


def pack_episodes(file: EpisodeFile, most_bytes: int) -> Payload:
    """As many of the file's episodes as fit into `most_bytes` of base64, evenly over the iterations."""
    order = _even_order(file)
    best, fits, count = Payload(_compressed(file, [])[0], 0, len(order)), 0, min(len(order), FIRST_GUESS)
    for _ in range(MOST_TRIES):
        text, packed = _compressed(file, sorted(order[:count]))
        if len(text) <= most_bytes:
            best, fits = Payload(text, packed, len(order)), count
        fitting = min(len(order), int(count * most_bytes / len(text) * 0.97))
        if fitting <= fits * 1.02:
            break
        count = fitting
    return best


def _even_order(file: EpisodeFile) -> list[tuple[int, int, int]]:
    """All places, such that any first part of them holds equally many of every iteration."""
    chance = random.Random(0)
    by_iteration: dict[int, list[tuple[int, int, int]]] = {}
    for place in file.places:
        by_iteration.setdefault(place[0], []).append(place)
    ranked = []
    for places in by_iteration.values():
        chance.shuffle(places)
        ranked += [(rank, chance.random(), place) for rank, place in enumerate(places)]
    return [place for *_, place in sorted(ranked)]


def _compressed(file: EpisodeFile, places: list[tuple[int, int, int]]) -> tuple[str, int]:
    """The text, and how many episodes are in it."""
    packed = [pack(episode) for episode in file.read(places)]
    content = json.dumps(packed, separators=(",", ":"), allow_nan=False).encode("ascii")
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii"), len(packed)


def pack(episode: dict) -> list:
    """[iteration, slot, source, kind asked for, passage, attempts]; page.js takes it apart.

    An attempt is [text, tokens, reason why invalid or null, grounded, reward, is it the Reasoner's task, question, gold answer, kind,
    answers, those with the passage in view as [right, all] or null], an answer [text, extracted (0: the stripped text), correct,
    reason of the verdict, reward].
    """
    passage = episode.get("passage")
    passage = passage if isinstance(passage, dict) else {}
    return [
        episode["iteration"],
        _rounded(episode.get("slot")),
        _cut(passage.get("source"), 200),
        _cut(episode.get("answer_type"), 200),
        _cut(passage.get("text"), LONGEST_PASSAGE),
        [_attempt(attempt) for attempt in episode["attempts"]],
    ]


def _attempt(attempt: dict) -> list:
    task = attempt.get("task")
    task = task if isinstance(task, dict) else {}
    return [
        _cut(attempt.get("text"), LONGEST_TEXT),
        _rounded(attempt.get("tokens")),
        None if attempt.get("invalid") is None else str(attempt["invalid"]),
        None if attempt.get("grounded") is None else bool(attempt["grounded"]),
        _rounded(attempt.get("reward")),
        int(bool(attempt.get("is_reasoner_task"))),
        _cut(task.get("question"), LONGEST_TEXT) if task else None,
        _cut(task.get("gold_answer"), LONGEST_TEXT) if task else None,
        None if task.get("answer_type") is None else str(task["answer_type"]),
        [_answer(answer) for answer in dicts(attempt.get("answers"))],
        _right(dicts(attempt.get("grounded_answers"))),
    ]


def _right(answers: list[dict]) -> list[int] | None:
    return [sum(bool(answer.get("correct")) for answer in answers), len(answers)] if answers else None


def _answer(answer: dict) -> list:
    text, extracted = _cut(answer.get("text"), LONGEST_TEXT), answer.get("extracted")
    extracted = None if extracted is None else _cut(extracted, LONGEST_TEXT)
    same = extracted is not None and extracted == text.strip()
    return [text, 0 if same else extracted, int(bool(answer.get("correct"))), _cut(answer.get("why"), 200), _rounded(answer.get("reward"))]


def _rounded(value: object) -> float | None:
    return round(value, 4) if isinstance(value, (int, float)) and abs(value) < 1e15 else None  # NaN is not smaller, either


def _cut(text: object, longest: int) -> str:
    """The text, without its middle if it is longer than `longest` characters."""
    text = "" if text is None else str(text)
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out of this report ...]\n{text[-half:]}"
