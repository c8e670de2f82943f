"""Questions that need no download: the Factbook's held-out countries, and reasoning-gym's puzzles."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_spice.evaluation import factbook
from megatron_spice.evaluation.puzzles import puzzles
from megatron_spice.game.options import options_in

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ROOT / "assets" / "factbook.jsonl"
COUNTRIES = ["Algeria", "Austria", "Togo", "Ghana", "France", "Chile", "Peru", "Kenya", "Japan"]


@pytest.fixture
def documents(tmp_path) -> Path:
    """A document a country; France's mentions Togo's capital, as a neighbour's document may."""
    path = tmp_path / "factbook.jsonl"
    with open(path, "w") as out:
        for number, country in enumerate(COUNTRIES):
            text = (
                f"{country} - Capital: name: City{country}; geographic coordinates: 1 N, 2 E\n{country} - Coastline: {number + 10},{number}00 km\n"
                f"{country} - Area: total: 1,{number}00 sq km; land: 1 sq km"
            )
            text += "\nFrance - Background: its treaty with Togo was signed in CityTogo." if country == "France" else ""
            out.write(json.dumps({"text": text, "id": f"{country} - Geography"}) + "\n")
    return path


def test_questions_are_true_and_about_held_out_countries(documents):
    held = [country for country in COUNTRIES if factbook.is_held_out(f"{country} - Geography")]
    items = factbook.questions(documents)
    assert "Togo" in held and {item.id.split("/")[0] for item in items} == set(held)
    assert "Togo/capital" not in {item.id for item in items}, "a training document states it"
    for item in items:
        country, fact = item.id.split("/")
        number = COUNTRIES.index(country)
        truth = {"capital": f"City{country}", "coastline": f"{number + 10},{number}00", "area": f"1,{number}00"}[fact]
        said = options_in(item.task.question)[1][item.task.gold_answer] if item.task.answer_type == "MCQ" else item.task.gold_answer
        assert said == truth and country in item.task.question
    assert items == factbook.questions(documents)
    assert factbook.questions(documents, limit=2) == items[:2]


def test_open_questions_hold_their_answer(documents):
    closed, opened = factbook.questions(documents), factbook.questions(documents, open_book=True)
    assert [item.id for item in closed] == [item.id for item in opened]
    for item in opened:
        options = options_in(item.task.question)
        answer = options[1][item.task.gold_answer] if options else item.task.gold_answer
        assert answer in item.task.question.split("\n")[0]


def test_training_documents_and_held_out_ones(documents, tmp_path):
    counts = factbook.split(documents, tmp_path / "train.jsonl", tmp_path / "held.jsonl")
    train, held = ([json.loads(line)["id"] for line in (tmp_path / name).open()] for name in ("train.jsonl", "held.jsonl"))
    assert counts == (len(train), len(held)) and len(train) + len(held) == len(COUNTRIES)
    assert not any(map(factbook.is_held_out, train)) and all(map(factbook.is_held_out, held))


def test_another_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="examples/fetch_assets.py texts"):
        factbook.questions(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="other.jsonl:1 has no `text` and `id`"):
        factbook.questions(tmp_path / "other.jsonl")


@pytest.mark.skipif(not TEXTS.exists(), reason="assets/factbook.jsonl is not there: examples/fetch_assets.py texts")
def test_the_set_over_the_real_factbook_is_this_one():
    items = factbook.questions(TEXTS)
    assert len(items) == factbook.SIZE
    kinds = [item.task.answer_type for item in items]
    assert min(kinds.count(kind) for kind in ("MCQ", "String", "Integer")) > 40
    content = json.dumps([list(item.as_json().values()) for item in items])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "0ef1a8868cbf4fcd"
    known = {item.id: item.task for item in items}
    assert known["Togo/highest-metres"].gold_answer == "986"


def test_puzzles_are_the_same_again():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (requirements/evaluation.txt)")
    items = puzzles("reasoning-gym/gcd", 12)
    assert items == puzzles("reasoning-gym/gcd", 12) and items[:5] == puzzles("reasoning-gym/gcd", 5)
    assert {item.task.answer_type for item in items} == {"Integer"}
    assert puzzles("reasoning-gym/family_relationships", 3)[0].task.answer_type == "String"
    with pytest.raises(ValueError, match="has no task 'nothing'; it has .*gcd"):
        puzzles("reasoning-gym/nothing")
    with pytest.raises(ValueError, match="no single right answer"):
        puzzles("reasoning-gym/propositional_logic")
