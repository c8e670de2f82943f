"""What the engine has said in a game so far, so that a game can be put off and go on later.

A game chooses from (seed, iteration, slot) and from what the engine says, nothing else. So a game that is played again while
its journal answers for the engine comes to the very point at which it was put off, and nothing of its own state is kept.

A completion that was cut short goes on from its last token, with prompt and partial completion as the prompt and what is left
of its budget, under whatever weights the engine has by then; each token keeps the log-probability of the policy that sampled
it (partial rollouts: Kimi k1.5, arXiv 2501.12599). A request is known by its prompt and seed, so that a journal never
answers what was not asked: with another recipe's prompts a game is played anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_spice.game.records import Completion, Generator, Sampling
from megatron_spice.game.together import GamePutOff, together

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, without control tokens."""

_SURROUNDING = 5
"""Prompt tokens that a completion is decoded together with, since a token's text may depend on the one before (as SGLang does)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request's completions so far, by sample; those with the finish "abort" are to be continued."""

    prompt_ids: tuple[int, ...]
    seed: int | None
    completions: tuple[Completion, ...]


class Recorder:
    """An engine as one game sees it: answers what the journal knows, asks the engine for the rest, and keeps it all.

    Args:
        said: the journal of the game when it was put off; empty for a new one.
        is_over: whether nothing may be asked of the engine any more.
    """

    def __init__(
        self, engine: Generator, said: Sequence[Entry], decode: Decode, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self._engine = engine
        self._decode = decode
        self._is_over = is_over
        self._entries = list(said)
        self._unread = list(range(len(self._entries)))
        self.num_aborted = 0
        """Completions that were cut short while this was the game's engine."""

    @property
    def said(self) -> tuple[Entry, ...]:
        """The journal as it is now."""
        return tuple(entry for entry in self._entries if entry.completions)

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        """See `Generator`.

        Raises:
            GamePutOff: a completion is not whole and will not become so now.
        """
        place = self._place(tuple(prompt_ids), sampling.seed)
        entry = self._entries[place]
        nothing = Completion(entry.prompt_ids, (), (), "abort", "")
        held = [*entry.completions[:num_samples], *[nothing] * (num_samples - len(entry.completions))]
        missing = [index for index, completion in enumerate(held) if completion.finish == "abort"]
        if missing and self._is_over():
            raise GamePutOff
        if missing:
            if len(missing) == num_samples and not any(completion.completion_ids for completion in held):
                held = await self._engine.generate(prompt_ids, num_samples, sampling)
            else:
                for index, completion in zip(missing, await self._continue(held, missing, sampling)):
                    held[index] = completion
            self.num_aborted += sum(completion.finish == "abort" for completion in held)
            self._entries[place] = replace(entry, completions=tuple(held))
        if any(completion.finish == "abort" for completion in held):
            raise GamePutOff
        return list(held)

    def _place(self, prompt_ids: tuple[int, ...], seed: int | None) -> int:
        """Where this request is in the journal; each entry answers once."""
        for place in self._unread:
            entry = self._entries[place]
            if entry.seed == seed and entry.prompt_ids == prompt_ids:
                self._unread.remove(place)
                return place
        self._entries.append(Entry(prompt_ids, seed, ()))
        return len(self._entries) - 1

    async def _continue(self, held: Sequence[Completion], missing: Sequence[int], sampling: Sampling) -> list[Completion]:
        """The completions of these places, each continued by a request of its own; they need not end."""
        prompt_ids = list(held[0].prompt_ids)
        if len(missing) > 1:
            # Requests that come together do not find each other's prompt in the engine's cache: put it there first.
            await self._engine.generate(prompt_ids, 1, replace(sampling, max_new_tokens=1))

        async def one(index: int) -> Completion:
            part = held[index]
            left = sampling.max_new_tokens - len(part.completion_ids)
            if left < 1:  # only if the recipe's limit was lowered meanwhile
                return joined(part, Completion(part.prompt_ids, (), (), "length", ""), sampling.stop, self._decode)
            if self._is_over():
                return part
            rest = replace(sampling, max_new_tokens=left, seed=sampling.seed_of(index))
            [more] = await self._engine.generate(prompt_ids + list(part.completion_ids), 1, rest)
            return joined(part, more, sampling.stop, self._decode)

        return await together([one(index) for index in missing])


def joined(part: Completion, more: Completion, stop: tuple[str, ...], decode: Decode) -> Completion:
    """One completion from an aborted one and its continuation.

    The engine looks for stop strings in what it has generated itself. One that begins in `part` and ends in `more` is found
    here, and what was generated after it is dropped.
    """
    if not part.completion_ids:
        return replace(more, prompt_ids=part.prompt_ids)
    ids, logprobs, finish = part.completion_ids + more.completion_ids, part.logprobs + more.logprobs, more.finish
    text = _text(part.prompt_ids, ids, decode)
    if any(each in text for each in stop):
        length = _first_with_stop(part.prompt_ids, ids, stop, decode)
        ids, logprobs, finish = ids[:length], logprobs[:length], "stop"
        text = _text(part.prompt_ids, ids, decode)
    ends = [place for place in map(text.find, stop) if place >= 0]
    whole = replace(
        part, completion_ids=ids, logprobs=logprobs, finish=finish, text=text[: min(ends)] if ends else text
    )  # fmt: skip
    if not more.completion_ids or more.weight_version == part.weight_version:
        return whole
    run = (part.weight_version, len(part.completion_ids) - sum(count for _, count in part.earlier))
    return replace(whole, weight_version=more.weight_version, earlier=(*part.earlier, run))


def _text(prompt_ids: tuple[int, ...], ids: tuple[int, ...], decode: Decode) -> str:
    before = prompt_ids[-_SURROUNDING:]
    return decode(before + ids)[len(decode(before)) :]


def _first_with_stop(prompt_ids: tuple[int, ...], ids: tuple[int, ...], stop: tuple[str, ...], decode: Decode) -> int:
    """The fewest of these tokens whose text has a stop string; all of them have."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        text = _text(prompt_ids, ids[:middle], decode)
        low, high = (low, middle) if any(each in text for each in stop) else (middle + 1, high)
    return low
