"""What flows through one iteration of SPICE, from a passage to what the policy is trained on.

    Passage -> Attempt (one Challenger completion) -> Task -> Answer (one Reasoner completion) -> Episode -> Trajectory

Tokens in, tokens out: a `Completion` keeps the ids that the engine sampled and those are what is trained on; text is only
for parsing and for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol

AnswerType = Literal["MCQ", "Integer", "Expression", "String"]
Role = Literal["challenger", "reasoner"]


class Packed:
    """Pickled as a call with its fields in order: what dataclasses do by themselves, field by field in Python, takes ten times as
    long, and every rank reads what all ranks have played."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple([getattr(self, name) for name in self.__match_args__])  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Passage:
    """A segment of a document. `index` is its row in the corpus's passage table, `token_ids` its tokens ([length] ids)."""

    index: int
    document: int
    source: str
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt. Control tokens are read as such only in `trusted` pieces: a passage may spell `<|im_end|>`."""

    text: str
    trusted: bool = True


Prompt = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: temperature 0 is greedy; generation ends at an end-of-text id, at a `stop` string or at the limit.

    `seed` is that of a request, for engines that sample by it (`rollout.deterministic`); each of its samples has its own.
    `role` is who speaks, for what has another engine for each.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    role: Role = "reasoner"

    def seed_of(self, index: int) -> int | None:
        """The seed of one of a request's samples: engines hash seeds, so neighbours have nothing in common."""
        return None if self.seed is None else self.seed + index


@dataclass(frozen=True, slots=True)
class Completion(Packed):
    """One sampled continuation.

    `prompt_ids` [prompt length], `completion_ids` [completion length] and `logprobs` [completion length] (natural log, of
    the sampled ids at the sampling temperature, by the engine). `finish` is "stop", "length" (cut: never a valid task) or
    "abort" (cut short by us: no end-of-text id, no stop string and fewer tokens than the limit, so that it can be continued).
    `text` decodes `completion_ids` without the stop string; it means nothing while the finish is "abort".

    `weight_version` is of the weights that sampled the last token; `earlier` tells those of a continued completion's first
    tokens: (version, number of tokens) from the start.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    text: str
    weight_version: str = ""
    earlier: tuple[tuple[str, int], ...] = ()

    @property
    def weight_versions(self) -> str:
        """All of them from the first token to the last, as in "3+4"."""
        return "+".join([*(version for version, _ in self.earlier), self.weight_version])

    def num_stale(self, version: str) -> int:
        """How many of the first tokens were sampled under other weights than these, up to the last such token."""
        return len(self.completion_ids) if self.weight_version != version else sum(count for _, count in self.earlier)


@dataclass(frozen=True, slots=True)
class Task(Packed):
    """A question with a verifiable answer. For MCQ the options are part of `question` and `gold_answer` is a letter."""

    question: str
    gold_answer: str
    answer_type: AnswerType


class InvalidReason(str, Enum):
    """Why a Challenger completion is not a task; the value is what metrics and episode logs say."""

    TRUNCATED = "truncated"
    UNPARSABLE = "unparsable"
    UNSUITABLE = "unsuitable"
    EMPTY_QUESTION = "empty_question"
    EMPTY_ANSWER = "empty_answer"
    BAD_OPTIONS = "bad_options"
    BAD_LETTER = "bad_letter"
    WRONG_TYPE = "wrong_type"
    BAD_INTEGER = "bad_integer"
    BAD_EXPRESSION = "bad_expression"
    LONG_STRING = "long_string"
    UNGROUNDED = "ungrounded"
    REFERS_TO_PASSAGE = "refers_to_passage"
    COPIED = "copied"
    GIVES_AWAY = "gives_away"
    DUPLICATE = "duplicate"
    LONG_QUESTION = "long_question"


@dataclass(frozen=True, slots=True)
class Verdict(Packed):
    """What the verifier made of a Reasoner completion: `reason` says how it was decided ("exact", "letter", "math",
    "different", "no_answer", "too_long", "timeout", "crashed", ...)."""

    correct: bool
    extracted: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Answer(Packed):
    """One Reasoner completion; `reward` is 1.0 or 0.0, `advantage` is set when its task became the Reasoner's task."""

    completion: Completion
    verdict: Verdict
    reward: float
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Attempt(Packed):
    """One Challenger completion: either `task` or `invalid` is set.

    `grounded`: the answer occurs in the passage and not in the question (None for an invalid attempt).
    `in_group`: it is one of the G that are rewarded and trained on; only then `reward` and `advantage` are set.
    `is_reasoner_task`: its answers are the Reasoner's training group.
    `grounded_answers`, `options_only_answers`: of an audit (`audit/reanswer.py`); nobody is paid by them.
    """

    completion: Completion
    task: Task | None
    invalid: InvalidReason | None
    grounded: bool | None = None
    in_group: bool = False
    answers: tuple[Answer, ...] = ()
    reward: float | None = None
    advantage: float | None = None
    is_reasoner_task: bool = False
    grounded_answers: tuple[Answer, ...] = ()
    options_only_answers: tuple[Answer, ...] = ()

    @property
    def pass_rate(self) -> float | None:
        """Share of correct answers, None when the attempt was not answered."""
        if not self.answers:
            return None
        return sum(answer.verdict.correct for answer in self.answers) / len(self.answers)


@dataclass(frozen=True, slots=True)
class Episode:
    """Everything that happened on one passage. It counts in the `iteration` in which it ended.

    `slot` is the passage's place in the batch of the iteration in which it was begun: `begun`, or `iteration` if that is None.
    `prompt_style` is how the Challenger was asked; the Reasoner was asked in the same way where `reasoner_prompt_style` is None.
    """

    iteration: int
    slot: int
    passage: Passage
    prompt_style: str
    answer_type: AnswerType
    attempts: tuple[Attempt, ...]
    verifier_timeouts: int = 0
    seconds: float = 0.0
    begun: int | None = None
    reasoner_prompt_style: str | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sequence to train on. Trajectories with equal `prompt_ids` can share the prompt's computation.

    `prompt_ids` [p], `completion_ids` [c], `logprobs` [c] as sampled; `advantage` is one number for all c tokens. The first
    `num_stale` of the c tokens were sampled under older weights than those that are about to be trained.
    """

    role: Role
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float
    reward: float
    weight: float = 1.0
    num_stale: int = 0


class Tokenizer(Protocol):
    """What the game needs of a tokenizer; `corpus/tokenizer.py` has the real one."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, segment by segment, untrusted segments as plain text."""

    def chat_wrapper(self, system: str | None) -> tuple[str, str]:
        """Text before and after a single user message in the model's own chat format, ready for the assistant's turn."""


class Generator(Protocol):
    """What the game needs of a rollout engine."""

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        """`num_samples` completions of one prompt.

        Raises:
            EngineError: the engine failed; the passage must not be scored.
        """
