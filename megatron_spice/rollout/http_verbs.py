"""Blocking HTTP to an engine: one request, one answer or an EngineError that says what was asked.

`http.client` and nothing above it: it knows no proxies (a proxy variable in the environment must never see weights or
an API key) and its timeout covers connecting and each wait for bytes.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from megatron_spice.rollout.engine import EngineError, EngineRefused
from megatron_spice.rollout.pulse import LOOK


class HttpVerbs:
    """`url` is http:// or https://. `api_key` may be "". `timeout`: seconds one request may wait. `diagnose` adds what is known
    about a failing engine, or "". `check` raises EngineError where the engine has ended, which is looked at while an answer is waited
    for: a server that somebody ends by SIGTERM may have lost its scheduler, and keep the connection open for the answer for ever."""

    def __init__(
        self, url: str, api_key: str, *, timeout: float, diagnose: Callable[[], str] = lambda: "", check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.url = url
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._diagnose, self._check = diagnose, check
        self._address = urlsplit(url).netloc
        self._connect = http.client.HTTPSConnection if urlsplit(url).scheme == "https" else http.client.HTTPConnection

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> tuple[int, str]:
        """Status and text of the answer.

        Raises:
            EngineError: there was no answer, or none in time, or the engine has ended.
        """
        seconds = self._timeout if timeout is None else timeout
        connection = self._connect(self._address, timeout=seconds)
        try:
            payload = None if body is None else json.dumps(body)
            headers = {**self.headers, "Content-Type": "application/json"} if payload else self.headers
            connection.request(method, path, body=payload, headers=headers)
            self._wait(connection.sock, seconds)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except TimeoutError as error:
            raise self.failure(method, path, f"did not answer within {seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise self.failure(method, path, f"failed ({type(error).__name__}: {error})") from error
        finally:
            connection.close()

    def _wait(self, connection: socket.socket, seconds: float) -> None:
        """Until there is something to read."""
        waiting, deadline = select.poll(), time.monotonic() + seconds
        waiting.register(connection, select.POLLIN)
        while not waiting.poll(1000 * max(0.0, min(LOOK, deadline - time.monotonic()))):
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """The answer's JSON, or its text if it is not JSON.

        Raises:
            EngineError: no answer.
            EngineRefused: a status other than 200, or an answer that says `"success": false`.
        """
        status, text = self.call(method, path, body, timeout=timeout)
        return self.accept(method, path, status, text)

    def accept(self, method: str, path: str, status: int, text: str) -> Any:
        """Checks an answer; arguments, result and errors as in `ask`."""
        try:
            content = json.loads(text) if text else None
        except ValueError:
            content = text
        refused = isinstance(content, dict) and content.get("success") is False
        if status != 200 or refused:
            raise EngineRefused(str(self.failure(method, path, f"was answered with {status}: {text[:2000]}")), status, text)
        return content

    def failure(self, method: str, path: str, what: str) -> EngineError:
        """An error for this request, with what `diagnose` adds."""
        details = self._diagnose()
        return EngineError(f"engine {self.url}: {method} {path} {what}" + (f"\n{details}" if details else ""))
