"""A server of OpenAI's HTTP interface, asked for completions: the model that is evaluated, or a judge.

It gets text, not ids, and applies the model's chat template itself. So the same questions are asked in the same words as in
training, but whether control tokens in them count as such is the server's affair. Whatever fails is tried again, because the
next hour's questions should not be lost to one refused connection; what keeps failing ends the evaluation. Only a request that
does not fit the model's context is told apart, because that is the question's affair and not the server's.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import aiohttp

ATTEMPTS = 4
_FIRST_PAUSE = 1.0
_FINAL = (400, 401, 403, 404, 405, 413, 422)
"""Statuses that will not be otherwise the next time."""
# As SGLang, vLLM, llama.cpp, TGI and the hosted ones say it; none of them has a code in common with another. What else they refuse
# may speak of tokens too, or of something that is too large.
_TOO_LONG = re.compile(
    r"\bcontext[ _](?:length|size|window)|maximum (?:allowed|input|sequence|prompt|model) length|maximum number of tokens|too many tokens"
    r"|\b(?:inputs?|prompt|request|messages?) (?:is|are) too (?:long|large)|messages\b.{0,20}: string too long|reduce the length"
    r"|\binputs\W{1,3}(?:must have less than|tokens \+)",
    re.IGNORECASE,
)


class EndpointError(RuntimeError):
    """A server did not answer, or not with what was asked for."""


class Refused(EndpointError):
    """A server answered, and what it said was no. `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TooLong(RuntimeError):
    """A question, with room for its answer, does not fit the context of the model that is asked. Others may."""


def is_too_long(status: int, said: str) -> bool:
    """Whether a server's refusal is about the length of the request."""
    return status == 413 or (status in (400, 422) and _TOO_LONG.search(said) is not None)


class Endpoint:
    """`url` with or without the final /v1; `key` may be "". `model` "": the first that the server lists."""

    def __init__(self, url: str, key: str, model: str = "", *, timeout: float = 600.0) -> None:
        url = url.rstrip("/")
        self.url = url if url.endswith("/v1") else url + "/v1"
        self.model = model
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        try:
            if not self.model:
                listed = await self._ask("GET", "/models", None)
                self.model = str(self._read(listed, "data", 0, "id"))
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def about(self) -> tuple[dict[str, str], int | None]:
        """What the server says of the model behind its name: "id" and "root" as it lists them, and, of an SGLang server, its
        "model_path" and "weight_version"; what it does not say is missing. And the model's context in tokens, as SGLang and vLLM
        list it.

        Raises:
            EndpointError: it does not answer, or the key is wrong.
        """
        try:
            listed = self._read(await self._ask("GET", "/models", None), "data")
        except Refused as error:
            if error.status in (401, 403):
                raise
            listed = []  # not every server has the list
        said = next((each for each in listed if isinstance(each, dict) and each.get("id") == self.model), {})
        try:
            said = {**said, **await self._ask("GET", self.url.removesuffix("/v1") + "/model_info", None, attempts=1)}
        except (EndpointError, TypeError):
            pass  # no SGLang server
        context = said.get("max_model_len")
        about = {key: str(said[key]) for key in ("id", "root", "model_path", "weight_version") if said.get(key)}
        return about, context if isinstance(context, int) else None

    async def chat(self, messages: list[dict[str, str]], samples: int, **settings: Any) -> list[dict[str, Any]]:
        """`samples` replies to a conversation: {"text", "finish", "tokens"} each; `tokens` is None where the server does not tell.

        Raises:
            EndpointError: no answer in `ATTEMPTS` tries, or fewer replies than were asked for.
            TooLong: the messages and `max_tokens` do not fit the model's context.
        """
        return await self._replies("/chat/completions", {"messages": messages, **settings}, samples)

    async def complete(self, prompt: str, samples: int, **settings: Any) -> list[dict[str, Any]]:
        """`samples` continuations of a text; otherwise as `chat`."""
        return await self._replies("/completions", {"prompt": prompt, **settings}, samples)

    async def _replies(self, path: str, body: dict[str, Any], samples: int) -> list[dict[str, Any]]:
        answer = await self._ask("POST", path, {"model": self.model, "n": samples, **body})
        choices = self._read(answer, "choices")
        if len(choices) != samples:
            raise EndpointError(f"{self.url}{path}: {samples} replies were asked for, {len(choices)} came")
        total = (answer.get("usage") or {}).get("completion_tokens")
        return [
            {
                "text": self._read(choice, "message", "content") or "" if "message" in choice else self._read(choice, "text"),
                "finish": choice.get("finish_reason") or "",
                "tokens": total if samples == 1 else None,
            }
            for choice in choices
        ]

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, attempts: int = ATTEMPTS) -> Any:
        """The answer's JSON. `path` is below `url`, or an address of its own."""
        address = path if path.startswith("http") else self.url + path
        pause, problem = _FIRST_PAUSE, ""
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            try:
                async with self._session.request(method, address, json=body) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    said = await response.text(errors="replace")
                    problem = f"{method} {address} was answered with {response.status}: {said[:500]}"
                    if is_too_long(response.status, said):
                        raise TooLong(problem)
                    if response.status in _FINAL:
                        raise Refused(problem, response.status)
            except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
                problem = f"{method} {address} failed ({type(error).__name__}: {error})"
        raise EndpointError(problem)

    def _read(self, answer: Any, *keys: str | int) -> Any:
        for key in keys:
            try:
                answer = answer[key]
            except (KeyError, IndexError, TypeError) as error:
                raise EndpointError(f"{self.url} answered what is not of OpenAI's interface (no {key!r}): {answer!r:.300}") from error
        return answer
