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
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|operatorname|mbox)\s*\{([^{}]*)\}"
)
_SPACING = re.compile(r"\\[,;:! ]|~|\\q?quad(?![a-zA-Z])")
_DECORATION = " \t\r\n.,;:!?'\"`*\u201c\u201d\u2018\u2019\u00ab\u00bb"


def strip_latex(text: str) -> str:
    """`text` without math delimiters, text wrappers such as `\\text{...}` and LaTeX spacing; other commands stay."""
    text = text.replace("\\(", " ").replace("\\)", " ").replace("\\[", " ").replace("\\]", " ").replace("$", "")
    for _ in range(4):  # wrappers nest, but never deeply in earnest
        text, changed = _WRAPPER.subn(r"\1", text)
        if not changed:
            break
    text = _SPACING.sub(" ", text)
    return text.replace("\\%", "%").replace("\\&", "&").replace("\\_", "_").replace("\\#", "#").strip()


def normalise(text: str) -> str:
    """The form in which two strings are compared exactly: NFKC, unwrapped, case folded, single spaces, bare of
    quotes."""
    text = strip_latex(unicodedata.normalize("NFKC", text))
    text = unicodedata.normalize("NFKC", text.casefold())
    return " ".join(text.split()).strip(_DECORATION)
