"""A server of OpenAI's HTTP interface, asked for completions: the model that is evaluated, or a judge.

It gets text, not ids, and applies the model's chat template itself. So the same questions are asked in the same words as in
training, but whether control tokens in them count as such is the server's affair. Whatever fails is tried again, because the
next hour's questions should not be lost to one refused connection; what keeps failing ends the evaluation.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

ATTEMPTS = 4
_FIRST_PAUSE = 1.0


class EndpointError(RuntimeError):
    """A server did not answer, or not with what was asked for."""


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

    async def chat(self, messages: list[dict[str, str]], samples: int, **settings: Any) -> list[dict[str, Any]]:
        """`samples` replies to a conversation: {"text", "finish", "tokens"} each; `tokens` is None where the server does not tell.

        Raises:
            EndpointError: no answer in `ATTEMPTS` tries, or fewer replies than were asked for.
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

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        pause = _FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self._session.request(method, self.url + path, json=body) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    problem = f"was answered with {response.status}: {(await response.text(errors='replace'))[:500]}"
                    if response.status in (400, 401, 403, 404, 422):  # it will not be otherwise the next time
                        attempt = ATTEMPTS
            except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
                problem = f"failed ({type(error).__name__}: {error})"
            if attempt == ATTEMPTS:
                break
            await asyncio.sleep(pause)
            pause *= 2
        raise EndpointError(f"{method} {self.url}{path} {problem}")

    def _read(self, answer: Any, *keys: str | int) -> Any:
        for key in keys:
            try:
                answer = answer[key]
            except (KeyError, IndexError, TypeError) as error:
                raise EndpointError(f"{self.url} answered what is not of OpenAI's interface (no {key!r}): {answer!r:.300}") from error
        return answer
