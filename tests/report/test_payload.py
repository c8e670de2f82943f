"""Episodes packed into a page: what comes out is what went in, no text ends the element it lies in, and it fits."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import string
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from made_run import episode, write_lines

from megatron_spice.report.episode_file import scan
from megatron_spice.report.payload import LONGEST_TEXT, pack, pack_episodes


def unpacked(text: str) -> list:
    return json.loads(gzip.decompress(base64.b64decode(text)))


@given(st.text(), st.text(), st.text(), st.text(max_size=LONGEST_TEXT))
def test_any_text_survives_the_packing(tmp_path_factory, question: str, gold: str, passage: str, answer: str) -> None:
    path = tmp_path_factory.mktemp("log") / "episodes.jsonl"
    write_lines(path, [episode(1, question, gold, passage, (answer,))])
    payload = pack_episodes(scan(path, [], []), 10**6)
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", payload.text)
    ((number, _, source, kind, found, attempts),) = unpacked(payload.text)
    assert (number, source, kind, found) == (1, "made", "String", passage)
    assert attempts[0][6:8] == [question, gold]
    text, extracted, *_ = attempts[0][9][0]
    assert (text.strip() if extracted == 0 else extracted) == answer


junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@given(st.sampled_from(["passage", "answer_type", "slot"]), st.sampled_from(["text", "tokens", "invalid", "grounded", "reward", "task", "answers", "grounded_answers"]), junk, junk)
def test_a_log_of_another_version_is_shown_as_far_as_it_goes(tmp_path_factory, key: str, part: str, other: object, value: object) -> None:
    strange = episode(1)
    strange[key], strange["attempts"][0][part] = other, value
    path = tmp_path_factory.mktemp("log") / "episodes.jsonl"
    write_lines(path, [strange, episode(2)])
    file = scan(path, [1], [2])
    assert len(unpacked(pack_episodes(file, 10**6).text)) == 2


def test_what_fits_is_taken_evenly_and_nearly_fills(tmp_path: Path) -> None:
    chance = random.Random(1)
    texts = ["".join(chance.choices(string.ascii_letters, k=300)) for _ in range(400)]
    write_lines(tmp_path / "episodes.jsonl", [episode(1 + place // 40, text) for place, text in enumerate(texts)])
    file = scan(tmp_path / "episodes.jsonl", [], [])
    whole = pack_episodes(file, 10**7)
    assert (whole.episodes, whole.of) == (400, 400)
    for budget in (len(whole.text) // 2, 5000):
        part = pack_episodes(file, budget)
        assert 0.8 * budget < len(part.text) <= budget
        counts = Counter(found[0] for found in unpacked(part.text))
        assert sum(counts.values()) == part.episodes and max(counts.values()) - min(counts.get(number, 0) for number in range(1, 11)) <= 1
    assert pack_episodes(file, 100).episodes == 0


def test_long_texts_lose_their_middle() -> None:
    cut = pack(episode(1, passage="a" * 50_000 + "the end"))[4]
    assert len(cut) < 7000 and "characters left out of this report" in cut and cut.endswith("the end")
