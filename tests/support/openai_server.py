"""A small server of OpenAI's interface on the loopback: the model that is asked, and the judge."""

from __future__ import annotations

import asyncio
import re

from aiohttp import web


class Server:
    """Answers a question `n` with a box of what `answers` has for it, and a judge's question by whether both end alike.

    A conversation of more than `context` characters, with `max_tokens` for the answer, is refused as SGLang does. The answers to the
    questions in `endless` are cut where there is no more room.
    """

    def __init__(self, answers: dict[str, str], fail_first: int = 0, *, context: int = 10**9, serves: str = "small") -> None:
        self.answers = answers
        self.context = context
        self.serves = serves
        self.endless: set[str] = set()
        self.asked: list[str] = []
        self.failures = fail_first
        self.judged: list[str] = []
        self.systems: set[str] = set()

    async def chat(self, request: web.Request) -> web.Response:
        if self.failures:
            self.failures -= 1
            return web.Response(status=503, text="busy")
        body = await request.json()
        content = body["messages"][-1]["content"]
        if (total := len(content) + body["max_tokens"]) > self.context:
            said = f"Requested token count exceeds the model's maximum context length of {self.context} tokens: {total} tokens."
            return web.json_response({"object": "error", "message": said, "code": 400}, status=400)
        found = re.search(r"<expected>(.*)</expected>\n<candidate>(.*)</candidate>", content)
        if found:
            self.judged.append(found[2])
            text = "Yes." if found[1][-1] == found[2][-1] else "**no**"
        else:
            self.systems.add(body["messages"][0]["content"])
            self.asked.append(content.split("\n")[0])
            text = self.answers[content.split("\n")[0]]
        finish = "length" if content.split("\n")[0] in self.endless else "stop"
        choices = [{"message": {"content": text}, "finish_reason": finish}] * body["n"]
        tokens = body["max_tokens"] if finish == "length" else 5
        return web.json_response({"choices": choices, "usage": {"completion_tokens": tokens}})

    async def models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer secret":
            return web.Response(status=401, text="no")
        return web.json_response({"data": [{"id": self.serves, "max_model_len": self.context}]})


def play(server: Server, body) -> object:  # noqa: ANN001
    async def main() -> object:
        application = web.Application()
        application.add_routes([web.post("/v1/chat/completions", server.chat), web.get("/v1/models", server.models)])
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            return await body(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    return asyncio.run(main())
