#!/usr/bin/env python3
"""Grades the same generations with this project's rules, with Math-Verify alone and with lm-evaluation-harness, and lists every
disagreement with its explanation.

    python tools/grading_agreement.py GENERATIONS.jsonl OUTPUT_FOLDER

GENERATIONS is written, out of what `--logs`, `--made` and `--cases` name, if it is not there; otherwise it is read.
lm-evaluation-harness (0.4.13) is not a requirement of this project: pip install lm_eval==0.4.13 into another environment that
has this project's requirements, and run this there. Its parts that are used are its own: the regular expressions of its GSM8K
task, its filter that applies them, its exact match with what the task tells it to ignore, and the extraction and the
equivalence of its Hendrycks MATH task.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_spice.config.schema import VerifierConfig  # noqa: E402
from megatron_spice.game.extract import answer_line, last_boxed  # noqa: E402
from megatron_spice.game.records import Task  # noqa: E402
from megatron_spice.game.verify import Verifier  # noqa: E402

RIVALS = ("math_verify", "lm_eval_gsm8k", "lm_eval_math")
LONGEST = 20_000
"""Characters; longer cases are tests of limits, and the rivals have none."""


def collect(logs: list[Path], made: list[Path], cases: Path | None) -> list[dict[str, Any]]:
    """Generations with a numeric or mathematical gold answer: real ones, and the tests' cases that are meant to have a box."""
    found = [json.loads(line) for file in made for line in file.read_text(encoding="utf-8").splitlines()]
    for log in logs:
        header, *records = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        for record in {record["id"]: record for record in records}.values():  # the last line of a question counts
            for number, answer in enumerate(record["answers"]):
                about = {"id": f"{log.parent.name}/{header['task']}/{record['id']}/{number}", "source": f"{header['style']} {header['task']}"}
                found.append({**about, "style": "line" if header["style"] == "few_shot" else "boxed", **_of(record), "response": answer["response"]})
    for line in cases.read_text(encoding="utf-8").splitlines() if cases else ():
        case = json.loads(line)
        if case["group"] not in ("hostile", "lines") and isinstance(case["response"], str):
            found.append({"id": f"case/{case['id']}", "source": "cases", "style": "boxed", **_of(case), "response": case["response"], "why": case["reason"]})
    return [each for each in found if each["answer_type"] in ("Integer", "Expression") and len(each["response"]) <= LONGEST]


def _of(record: dict[str, Any]) -> dict[str, Any]:
    return {"answer_type": record["answer_type"], "gold": record["gold"]}


async def ours(generations: list[dict[str, Any]]) -> list[tuple[bool, str, str | None]]:
    """Training's verdicts: (correct, reason, extracted)."""
    found = []
    async with Verifier(VerifierConfig(workers=1, timeout=30.0)) as verifier:
        for each in generations:
            extract = answer_line if each["style"] == "line" else last_boxed
            verdict = await verifier.verify(Task("?", each["gold"], each["answer_type"]), extract(each["response"]) or None)
            found.append((verdict.correct, verdict.reason, verdict.extracted))
    return found


def math_verify_alone(each: dict[str, Any]) -> bool:
    """Math-Verify as its README has it, on the whole response: it finds the answer itself."""
    from math_verify import parse, verify

    gold = parse(f"${each['gold']}$")
    return bool(verify(gold, parse(each["response"])))


class Harness:
    """lm-evaluation-harness's own extraction and comparison, from its task files."""

    def __init__(self) -> None:
        import lm_eval
        import yaml
        from lm_eval.api.metrics import exact_match_hf_evaluate
        from lm_eval.filters.extraction import RegexFilter
        from lm_eval.tasks.hendrycks_math import utils

        settings = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
        [flexible] = [each for each in settings["filter_list"] if each["name"] == "flexible-extract"]
        [strict] = [each for each in settings["filter_list"] if each["name"] == "strict-match"]
        self._flexible, self._strict = (RegexFilter(**{k: v for k, v in each["filter"][0].items() if k != "function"}) for each in (flexible, strict))
        metric = settings["metric_list"][0]
        self._options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
        self._exact_match, self._math = exact_match_hf_evaluate, utils

    def gsm8k(self, each: dict[str, Any], strict: bool = False) -> bool:
        """The last number of the response (flexible-extract), or the one after #### (strict-match), against the gold one."""
        extraction = self._strict if strict else self._flexible
        [[prediction, *_]] = [extraction.apply([[each["response"]]], [{}])[0]]
        prediction = prediction if isinstance(prediction, str) else prediction[0]
        return bool(self._exact_match(predictions=[prediction], references=[f"#### {each['gold']}"], **self._options)["exact_match"])

    def math(self, each: dict[str, Any]) -> bool:
        """The last box by its own finding, against the gold answer by its own equivalence of strings."""
        box = self._math.last_boxed_only_string(each["response"])
        try:
            return bool(box) and self._math.is_equiv(self._math.remove_boxed(box), each["gold"])
        except AssertionError:  # an \fbox, which it finds and does not open
            return False


# Why rules differ, by what shows in a disagreement; the first that applies. (name, explanation)
EXPLANATIONS = {
    "no box": "There is no complete box, which training and evaluation ask for; the rival takes the last number or expression of the text.",
    "line": "The answer is the line after `Answer:`; the rival looks for a box, or takes the last number of the line.",
    "last number": "The rival takes the last number of the text out of what is not one (a set, a factorial, a term, an inequality, two answers, misplaced commas).",
    "digits": "The box holds the value in another form than its digits (arithmetic, a unit with a power, spaces between thousands, a leading zero, decimals that are zero, a typographic minus), or a number comes after it; the rival compares the last number of the text as a string.",
    "string": "The rival compares strings after a fixed clean-up, so other forms of the same value differ, and so do units or styles that it does not know.",
    "clean-up": "The rival's clean-up removes what changes the value or the kind of answer: units, `x =`, degrees, percent signs, spaces, a backslash.",
    "form": "The rival does not read this form of a box or of a number (a space before the brace, an fbox, a full stop, a style or colour, Markdown, a currency or degree sign, spaces between thousands, a million in words, 4.5e33).",
    "lenient": "The rival takes the first thing that it can read for the answer and drops the rest (a factorial, a second answer, a variable, a unit, a word), or treats a set, a list and a number alike.",
}  # fmt: skip


def explain(each: dict[str, Any], rival: str) -> str:
    """Which explanation a disagreement has."""
    if each["style"] == "line":
        return "line"
    if each["extracted"] is None:
        return "no box"
    if rival == "lm_eval_gsm8k":
        return "digits" if each["ours"] else "last number"
    if rival == "lm_eval_math":
        return "string" if each["ours"] else "clean-up"
    return "form" if each["ours"] else "lenient"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generations", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--logs", type=Path, nargs="*", default=[], help="logs of tools/evaluate.py")
    parser.add_argument("--made", type=Path, nargs="*", default=[], help="files of tools/grading_generations.py")
    parser.add_argument("--cases", type=Path, help="tests/game/grading_cases.jsonl")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.generations.exists():
        lines = [json.dumps(each) + "\n" for each in collect(options.logs, options.made, options.cases)]
        options.generations.write_text("".join(lines), encoding="utf-8")
    generations = [json.loads(line) for line in options.generations.read_text(encoding="utf-8").splitlines()]
    harness = Harness()
    results = []
    for each, (correct, reason, extracted) in zip(generations, asyncio.run(ours(generations)), strict=True):
        each |= {"ours": correct, "reason": reason, "extracted": extracted}
        each["math_verify"] = math_verify_alone(each)
        each["lm_eval_math"] = harness.math(each)
        each["lm_eval_gsm8k"] = harness.gsm8k(each) if each["answer_type"] == "Integer" else None
        each["lm_eval_gsm8k_strict"] = harness.gsm8k(each, strict=True) if each["answer_type"] == "Integer" else None
        each["differs"] = {rival: explain(each, rival) for rival in RIVALS if each[rival] not in (None, correct)}
        results.append(each)
    write(options.output, results)
    return 0


def write(folder: Path, results: list[dict[str, Any]]) -> None:
    """verdicts.jsonl, agreement.json and the list of disagreements, disagreements.md."""
    keep = ("id", "ours", "reason", "extracted", *RIVALS, "lm_eval_gsm8k_strict", "differs")
    (folder / "verdicts.jsonl").write_text("".join(json.dumps({key: each[key] for key in keep}) + "\n" for each in results))
    counts: dict[str, Any] = {}
    for source in sorted({each["source"] for each in results}):
        of_source = [each for each in results if each["source"] == source]
        counts[source] = {"generations": len(of_source), "ours": sum(each["ours"] for each in of_source)}
        for rival in RIVALS:
            judged = [each for each in of_source if each[rival] is not None]
            boxed = [each for each in judged if each["extracted"] is not None]
            counts[source][rival] = {
                "judged": len(judged), "right": sum(each[rival] for each in judged), "agree": sum(each[rival] == each["ours"] for each in judged),
                "with an answer": len(boxed), "agree there": sum(each[rival] == each["ours"] for each in boxed),
                "differs": dict(Counter(each["differs"][rival] for each in judged if rival in each["differs"])),
            }  # fmt: skip
    versions = {name: version(name) for name in ("math-verify", "lm_eval", "sympy", "latex2sympy2_extended")}
    strict = sum(bool(each["lm_eval_gsm8k_strict"]) for each in results)
    (folder / "agreement.json").write_text(json.dumps({"versions": versions, "strict-match right": strict, "sources": counts}, indent=1) + "\n")
    (folder / "disagreements.md").write_text(disagreements(results))


def disagreements(results: list[dict[str, Any]]) -> str:
    """Every one, below its explanation."""
    lines = ["# Every disagreement\n", "Columns: what was graded, gold, what this project extracted, its verdict; in cases, why it is that.\n"]
    for rival in RIVALS:
        for name, text in EXPLANATIONS.items():
            of_kind = [each for each in results if each["differs"].get(rival) == name]
            if of_kind:
                lines += [f"## {rival}: {name} ({len(of_kind)})\n", text + "\n"]
                lines += [f"- `{each['id']}` gold `{each['gold']}`, {_shown(each)} {'right' if each['ours'] else 'wrong'}{_why(each)}" for each in of_kind]
                lines.append("")
    return "\n".join(lines)


def _shown(each: dict[str, Any]) -> str:
    if each["extracted"] is None:
        return "nothing extracted:"
    return f"extracted `{' '.join(each['extracted'].replace('`', chr(39)).split())[:80]}`:"


def _why(each: dict[str, Any]) -> str:
    return f" ({each['why']})" if each.get("why") else ""


if __name__ == "__main__":
    sys.exit(main())
