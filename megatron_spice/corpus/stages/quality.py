"""datatrove's quality filters as judges of single documents.

They only say whether a document stays: its text is never edited, so what is in a corpus stands in its input (the C4
filter would also take lines out). They count n-grams in lists as long as the text, so they see its first mebibyte.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_spice.corpus.stages.options import Removal

SEEN = 1 << 20  # characters


def quality_judge(name: str) -> Callable[[str], Removal | None]:
    """The filter of this name (options.FILTERS) with datatrove's thresholds."""
    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.pipeline.filters.base_filter import get_filter_result

    from megatron_spice.corpus.stages.words import TOKENIZER

    made = {
        "gopher-quality": filters.GopherQualityFilter,
        "gopher-repetition": filters.GopherRepetitionFilter,
        "c4": filters.C4QualityFilter,
        "fineweb-quality": filters.FineWebQualityFilter,
    }[name](language=TOKENIZER)

    def judge(text: str) -> Removal | None:
        stays, detail = get_filter_result(made.filter(Document(text[:SEEN], "")))
        return None if stays else Removal(name, detail or "")

    return judge
