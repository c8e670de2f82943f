"""Optional stages between reading and tokenising: which documents are left out of a corpus, and why.

datatrove's filters, MinHash and n-gram decontamination behind one question, `Stages.why_not(document)`. Nothing of
datatrove is imported before a stage is asked for.
"""

from megatron_spice.corpus.stages.options import FILTERS, Removal, StageOptions
from megatron_spice.corpus.stages.preparation import NotAllJudged, Prepared, Stages, prepare

__all__ = ["FILTERS", "NotAllJudged", "Prepared", "Removal", "StageOptions", "Stages", "prepare"]
