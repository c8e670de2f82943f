"""One idea of "the same text" for the whole game: what grounding searches for and what the verifier compares.

Models decorate answers (LaTeX wrappers, quotes, a full stop, odd spaces), and without undoing that pass rates
collapse to zero for reasons that have nothing to do with knowing the answer. Undoing more than decoration (articles,
plurals, word order) would be a judgement, which the paper leaves out: other answer types than mathematics are matched
exactly.
"""

from __future__ import annotations

import re
import unicodedata

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|operatorname|mbox|underline"
    r"|(?:text)?color\s*\{[A-Za-z]{1,20}\})\s*\{([^{}]*)\}"
)
_SPACING = re.compile(
    r"(?<!\\)\\[,;:! ]|~|\\(?:q?quad|displaystyle|textstyle|small|normalsize|[lL]arge|LARGE|[hH]uge|bf|rm|it)(?![a-zA-Z])"
)
_DOLLAR = re.compile(r"(?<!\\)\\+\$")
# What typesetting makes of an apostrophe, a quote and a hyphen (NFKC leaves them alone).
_TYPOGRAPHY = str.maketrans(
    {**dict.fromkeys("\u2018\u2019\u02bc", "'"), **dict.fromkeys("\u201c\u201d", '"')}
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
)
_DECORATION = " \t\r\n.,;:!?'\"`*\u201c\u201d\u2018\u2019\u00ab\u00bb"


def strip_latex(text: str) -> str:
    """`text` without math delimiters, dollar signs, text wrappers such as `\\text{...}` and LaTeX spacing; other commands stay."""
    text = text.replace(",\\!", ",")  # how LaTeX writes a comma between thousands
    text = _DOLLAR.sub("", text)  # its backslash would be left alone, or taken for that of a space
    text = text.replace("\\(", " ").replace("\\)", " ").replace("\\[", " ").replace("\\]", " ").replace("$", "")
    for _ in range(4):  # wrappers nest, but never deeply in earnest
        text, changed = _WRAPPER.subn(r"\1", text)
        if not changed:
            break
    text = _SPACING.sub(" ", text)
    return text.replace("\\%", "%").replace("\\&", "&").replace("\\_", "_").replace("\\#", "#").strip()


def undecorated(text: str) -> str:
    """`text` without Markdown's marks and quotes around it, which are never mathematics there."""
    return text.strip(" \t\r\n*`\"")


def fold(text: str) -> str:
    """`text` without what typesetting and capitals add: NFKC, plain quotes and hyphens, case folded, single spaces."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.translate(_TYPOGRAPHY).split())


def normalise(text: str) -> str:
    """The form in which two strings are compared exactly: unwrapped, folded, bare of quotes and full stops."""
    return fold(strip_latex(unicodedata.normalize("NFKC", text))).strip(_DECORATION)
