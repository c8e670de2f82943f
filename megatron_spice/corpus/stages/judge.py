"""The stages that look at one document at a time, in order: language, quality filters, benchmarks.

Cheap ones first: the first that objects is the reason, and those after it are not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_spice.corpus.stages.options import Removal, StageOptions


class Judge:
    """Made once a worker: models and indexes are loaded here. `folder` holds the benchmarks' index."""

    def __init__(self, options: StageOptions, folder: Path):
        self._judges: list[Callable[[str], Removal | None]] = []
        if options.languages:
            from megatron_spice.corpus.stages.language import language_judge

            self._judges.append(language_judge(options.languages, options.language_threshold))
        if options.filters:
            from megatron_spice.corpus.stages.quality import quality_judge

            self._judges += [quality_judge(name) for name in options.filters]
        if options.decontaminate:
            from megatron_spice.corpus.stages.decontaminate import contamination_judge

            self._judges.append(contamination_judge(folder, options.ngram))

    def why_not(self, text: str) -> Removal | None:
        """Why the text goes; None: it stays. Blank texts are nobody's business here."""
        if not text.strip():
            return None
        for judge in self._judges:
            removal = judge(text)
            if removal is not None:
                return removal
        return None
