"""Questions about documents that training has not seen: facts of the World Factbook's held-out countries.

Whole countries are held out, chosen by a hash of their names, with all their documents: `split` cuts a corpus accordingly.
Questions come from fields whose form leaves no doubt (`FACTS`), so their gold answers are true if the Factbook is. A fact that a
line of a training document states too (the country and the answer both in it: a neighbour's border, say) is left out. Half are
free-form, half multiple choice, whose wrong options are other countries' values of the same field. Nothing is drawn but by
hashes: the same documents give the same questions.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.evaluation.items import Item, question_with
from megatron_spice.game.numerals import is_integer
from megatron_spice.game.records import Task
from megatron_spice.game.text import normalise

SIZE = 300
HELD_OUT_ONE_IN = 5
MAX_WORDS = 3  # of a String answer, as for a Challenger's
AMBIGUOUS = ("Congo", "Cocos")  # names that the questions would have to explain
_LINE_CHARACTERS = 240  # of the line before an open question
_LINE = re.compile(r"(?P<country>.+?) - (?P<field>[^:]+): (?P<text>.*)")


@dataclass(frozen=True, slots=True)
class Fact:
    """A kind of fact: what of a field's text is the answer (group 1), and what is asked; `{0}` is the country, `{1}` group 2."""

    name: str
    field: str
    pattern: re.Pattern[str]
    question: str


def _fact(name: str, field: str, pattern: str, question: str) -> Fact:
    return Fact(name, field, re.compile(pattern), question)


FACTS = (
    _fact("capital", "Capital", r"name: ([A-Z][^;()/\[]*); geographic", "What is the capital of {0}?"),
    _fact("region", "Map references", r"(Africa|Europe|Oceania|North America|South America)\Z", "Which part of the world is {0} in?"),
    _fact("internet", "Internet country code", r"(\.[a-z]{2})\Z", "What is the Internet country code of {0}?"),
    _fact("currency", "Exchange rates", r"Currency: [^;(]+ \(([A-Z]{3})\) per US dollar", "What is the three-letter code of the currency of {0}?"),
    _fact("independence-year", "Independence", r"\d{1,2} [A-Z][a-z]+ (\d{4}) \(from [^();]+\)\Z", "In which year did {0} become independent?"),
    _fact("independence-from", "Independence", r"\d{1,2} [A-Z][a-z]+ \d{4} \(from (?:the )?(UK|US|Soviet Union|[A-Z][a-z]+)\)\Z", "From which country did {0} become independent?"),
    _fact("area", "Area", r"total: ([\d,]+) sq km;", "How many square kilometres is the total area of {0}?"),
    _fact("coastline", "Coastline", r"([1-9][\d,]*) km\Z", "How many kilometres long is the coastline of {0}?"),
    _fact("highest-point", "Elevation", r"highest point: ([A-Z][^;0-9()/]*?) [\d,]+ m;", "What is the highest point of {0}?"),
    _fact("highest-metres", "Elevation", r"highest point: [A-Z][^;0-9()/]*? ([\d,]+) m;", "How many metres high is the highest point of {0}?"),
    _fact("adjective", "Nationality", r".*adjective: ([A-Z][a-z]+)\Z", "What is the adjective for what comes from {0}?"),
    _fact("divisions", "Administrative divisions", r"(\d+) ([a-z]+s)(?: \([^()]*\))?; ", "How many {1} is {0} divided into?"),
    _fact("airports", "Airports", r"(\d+) \(2025\)", "How many airports does {0} have?"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """A fact about a country and the line it stands in."""

    country: str
    fact: Fact
    answer: str
    question: str
    line: str


def country_of(document_id: str) -> str:
    """The country of a document's id, which is "country - section"."""
    return document_id.partition(" - ")[0]


def is_held_out(document_id: str) -> bool:
    """Whether a document belongs to a held-out country."""
    return _number(f"held out: {country_of(document_id)}") % HELD_OUT_ONE_IN == 0


def split(documents: Path, train: Path, held_out: Path) -> tuple[int, int]:
    """Writes the documents of a corpus to two files; returns how many went into each."""
    counts = [0, 0]
    with open(train, "w", encoding="utf-8") as one, open(held_out, "w", encoding="utf-8") as other:
        for document in read_documents(documents):
            held = is_held_out(document["id"])
            (other if held else one).write(json.dumps(document, ensure_ascii=False) + "\n")
            counts[held] += 1
    return counts[0], counts[1]


def read_documents(path: Path) -> Iterator[dict[str, str]]:
    """The documents of assets/factbook.jsonl.

    Raises:
        FileNotFoundError: it is not there; the message says how it is made.
        ValueError: it is another file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: python examples/fetch_assets.py texts {path}, or --data factbook=FILE")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            document = json.loads(line)
            if not {"text", "id"} <= set(document) or " - " not in document["id"]:
                raise ValueError(f"{path}:{number} has no `text` and `id` of the form `country - section`: is it examples/fetch_assets.py's?")
            yield document


def questions(path: Path, *, open_book: bool = False, limit: int | None = None) -> list[Item]:
    """The question set of a file of documents, `SIZE` of them or `limit`.

    Args:
        open_book: each question has its line of the document before it.
    """
    documents = list(read_documents(path))
    known = [fact for document in documents for fact in facts_of(document["text"])]
    held = [fact for fact in known if is_held_out(fact.country)]
    stated = _stated([document["text"] for document in documents if not is_held_out(document["id"])], held)
    chosen = sorted((fact for fact in held if fact not in stated), key=lambda fact: _number(_name(fact)))
    values: dict[str, list[str]] = {}
    for fact in known:
        values.setdefault(fact.fact.name, []).append(fact.answer)
    items = [_item(fact, values[fact.fact.name], open_book) for fact in chosen[: limit or SIZE]]
    if not items:
        raise ValueError(f"{path} holds no fact about a held-out country")
    return items


def facts_of(text: str) -> Iterator[Known]:
    """The facts that a document's lines state in a form that is read without doubt."""
    for line in text.split("\n"):
        found = _LINE.fullmatch(line)
        for fact in FACTS if found and found["country"] not in AMBIGUOUS else ():
            match = fact.pattern.match(found["text"]) if fact.field == found["field"] else None
            answer = match[1].strip() if match else ""
            if answer and answer in line[:_LINE_CHARACTERS] and (is_integer(answer) or len(answer.split()) <= MAX_WORDS):
                yield Known(found["country"], fact, answer, fact.question.format(found["country"], *match.groups()[1:]), line)


def _stated(texts: Iterable[str], facts: Sequence[Known]) -> set[Known]:
    """Facts of which some line of these texts names both the country and the answer."""
    by_country: dict[str, list[Known]] = {}
    for fact in facts:
        by_country.setdefault(fact.country, []).append(fact)
    if not by_country:
        return set()
    names = re.compile(r"(?<!\w)(?:" + "|".join(sorted(map(re.escape, by_country), key=len, reverse=True)) + r")(?!\w)")
    found: set[Known] = set()
    for text in texts:
        for line in text.split("\n"):
            for country in set(names.findall(line)):
                found.update(fact for fact in by_country[country] if re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", line))
    return found


def _item(fact: Known, values: Sequence[str], open_book: bool) -> Item:
    name = _name(fact)
    asked = f"{fact.line[:_LINE_CHARACTERS].strip()}\n{fact.question}" if open_book else fact.question
    others = sorted({value for value in values if normalise(value) != normalise(fact.answer)})
    if _number("form: " + name) % 2 and len(others) >= 3:
        draw = random.Random(_number("options: " + name))
        options = [fact.answer, *draw.sample(others, 3)]
        draw.shuffle(options)
        return Item(name, Task(question_with(asked, options), "ABCD"[options.index(fact.answer)], "MCQ"))
    return Item(name, Task(asked, fact.answer, "Integer" if is_integer(fact.answer) else "String"))


def _name(fact: Known) -> str:
    return f"{fact.country}/{fact.fact.name}"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
