"""Expressions before they meet the verifier: a cheap look at whether text can be one, and its LaTeX form.

Math-Verify reads letters as products of variables, so `listen` equals `silent`, and it pulls the first number out of
text that it cannot read, so `2*x` would equal 2. Both are kept from it here: words are refused unless they are known
functions or Greek letters, and what it is given is always one whole LaTeX expression. Plain notation (`2*x**2`,
`sqrt(x)`, `pi`) is translated first. This runs in the game's own process, so it is linear and bounded by
`MAX_LENGTH`.
"""

from __future__ import annotations

import re

from megatron_spice.game.text import strip_latex

MAX_LENGTH = 200
_FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lim max min gcd mod det sqrt frac dfrac "
    "tfrac sum prod int binom infty cdot times div left right pm leq geq neq approx ldots over vec hat bar circ "
    "prime".split()
)
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi "
    "psi omega pi Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split()
)
_COMMANDS = set("begin end cup cap emptyset setminus mathbb circ degree".split())  # which no plain word may be taken for
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{[bpvBV]?matrix\}")
_ALLOWED = re.compile(
    r"[A-Za-z0-9\s+\-*/^_=<>|!%&.,:()\[\]{}\\'\u03b1-\u03c9\u0391-\u03a9\u2212\u00b7\u00d7\u00f7\u221a"
    r"\u2264\u2265\u221e\u00b2\u00b3]*"
)
_WORD = re.compile(r"\\?[A-Za-z]{3,}")
_SYMBOLS = {
    "\u2212": "-", "\u00b7": r"\cdot ", "\u00d7": r"\times ", "\u00f7": "/", "\u03c0": r"\pi ",
    "\u2264": r"\leq ", "\u2265": r"\geq ", "\u221e": r"\infty ", "\u00b2": "^2", "\u00b3": "^3",
}  # fmt: skip
_NAMES = re.compile(
    r"(?<![\\A-Za-z])("
    + "|".join(sorted((_GREEK | _FUNCTIONS) - {"sqrt", "frac"}, key=len, reverse=True))
    + r")(?![A-Za-z])"
)
_SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)|\u221a\s*(?:\(([^()]*)\)|([0-9A-Za-z]+))")
_LONG_POWER = re.compile(r"([\^_])(-?[0-9]{2,}|-[0-9A-Za-z])")
_UNIT = re.compile(
    r"(?:(?:\\?\s*\\(?:text|mathrm|mbox)\s*\{(?:[^{}0-9,]|\^[0-9])*\}|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\u00b0)(?:\^\{?[0-9]\}?)?\s*)+\Z"
)
_SCIENTIFIC = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})(?![\w.])")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)")
_PAIRS = {")": "([", "]": "([", "}": "{"}  # half-open intervals close otherwise than they open


def _balanced(text: str) -> bool:
    opened: list[str] = []
    for character in text:
        if character in "([{":
            opened.append(character)
        elif character in _PAIRS and (not opened or opened.pop() not in _PAIRS[character]):
            return False
    return not opened


def looks_mathematical(text: str) -> bool:
    """Whether `text` may be handed to the verifier as an expression: short, mathematical characters, no plain words."""
    text = strip_latex(text)
    if (
        not text
        or len(text) > MAX_LENGTH
        or not _ALLOWED.fullmatch(text)
        or not _balanced(text.replace("\\{", "").replace("\\}", ""))
    ):
        return False
    text = _MATRIX.sub(" ", text)
    if text.count("(") + text.count("{") > 40 or not re.search(r"[0-9A-Za-z\u03b1-\u03c9\u03c0\u221e]", text):
        return False
    return all(_is_known(word) for word in _WORD.findall(text))


def _is_known(word: str) -> bool:
    name = word.removeprefix("\\")
    return name in _FUNCTIONS or name in _GREEK or (name != word and name in _COMMANDS)


def looks_arithmetic(text: str) -> bool:
    """Whether an answer to an Integer task is worth evaluating: digits and operators only, no variable, no
    factorial."""
    text = strip_latex(text)
    if "\\{" in text:  # a set
        return False
    commands = set(re.findall(r"\\([A-Za-z]+)", text))
    bare = re.sub(r"\\[A-Za-z]+", "", text)
    known = {"frac", "dfrac", "tfrac", "cdot", "times", "div", "sqrt", "left", "right"}
    return (
        looks_mathematical(text)
        and commands <= known
        and not re.search(r"[A-Za-z!%=<>|&']", re.sub(r"\bsqrt\b", "", bare))
    )


def without_unit(text: str) -> tuple[str, str]:
    """An expression and the unit written behind it as `\\text{...}` or degrees, "" for none. What is only words has none."""
    text = text.strip().rstrip("$\\. ")
    match = _UNIT.search(text)
    if match is None or not re.search(r"[0-9A-Za-z]", strip_latex(text[: match.start()])):
        return text, ""
    # Degrees are a unit where they stand alone, not in a temperature against another scale's.
    return text[: match.start()], re.sub(r"[\\^{}]|text|mathrm|mbox", " ", match.group())


def list_brackets(text: str) -> str | None:
    """Which brackets enclose a list, pair, set or interval: "{", "(" or "[" whatever they end with, None for no such thing."""
    text = re.sub(r"\\left|\\right", "", strip_latex(text)).strip()
    opening = next((mark for mark in ("\\{", "(", "[") if text.startswith(mark)), None)
    if opening is None or "," not in text or not text.endswith((")", "]", "}")):
        return None
    depth, inner = 0, text.replace("\\{", "(").replace("\\}", ")")
    for place, mark in enumerate(inner):  # one pair of brackets around everything, not `(0,1) \\cup (2,3)`
        depth += (mark in "([{") - (mark in ")]}")
        if depth == 0:
            return opening[-1] if place == len(inner) - 1 else None
    return None


def exact_decimals(latex: str) -> str:
    """`latex` with its decimals as fractions: a float would equal integers that differ in the seventeenth digit."""
    return _DECIMAL.sub(lambda match: rf"\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}", latex)


def to_latex(text: str) -> str:
    """The LaTeX of an expression written plainly or in LaTeX already; one side of the verifier's comparison."""
    text = strip_latex(text).strip().rstrip(".")
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text.replace("**", "^"))
    for _ in range(4):
        text, changed = _SQRT.subn(lambda match: r"\sqrt{" + next(filter(None, match.groups()), "") + "}", text)
        if not changed:
            break
    text = _NAMES.sub(r"\\\1 ", text)
    text = _LONG_POWER.sub(r"\1{\2}", text)
    if "%" in text:  # Math-Verify takes 50% for 0.5 and for 50; only the first is mathematics
        text = re.sub(r"([0-9.]+)\s*%", r"(\1/100)", text)
    return text
