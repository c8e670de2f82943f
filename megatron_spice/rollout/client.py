"""Talks to one SGLang server: `generate` for the game (asynchronous), the other verbs for the trainer (blocking).

Tokens in, tokens out: prompts are sent as ids, and what was sampled comes back as ids with the log-probability of each
at the sampling temperature; the ids include those of a stop string, the text does not.

The server's own answer to a call in the wrong state is often an assertion in its scheduler, which ends it: releasing
memory while it works, resuming what is awake. So the client keeps the state (what sleeps, whether an update is open)
and refuses such calls itself.

`Sampling.seed` is sent where the server is in its deterministic mode, the only one in which it samples by it. Elsewhere the
engine is seeded as a whole when it starts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp

from megatron_spice.cluster.whereabouts import moved
from megatron_spice.game.records import Completion, Sampling
from megatron_spice.rollout.bucket_loader import LOADER
from megatron_spice.rollout.engine import KV_CACHE, MEMORY, WEIGHTS, EngineError
from megatron_spice.rollout.http_verbs import HttpVerbs
from megatron_spice.rollout.pulse import LOOK, Silence

if TYPE_CHECKING:
    import torch


class EngineClient:
    """One server.

    Args:
        url: where it listens, as in "http://127.0.0.1:30000".
        api_key: sent with every request.
        request_timeout: seconds in which the server must answer one of the generations it was asked for, whichever.
        control_timeout: seconds any other request may take.
        tensor_parallel_size: the server's; each of its ranks gets the handles of a bucket.
        compare_first_update: let the server compare its parameters, bit by bit, with what the first update sent.
        sends_seeds: the server samples by the requests' seeds.
        diagnose: what is known about the server when it fails, for error messages.
        check: raises EngineError if the server has ended; asked while a request other than a generation waits.
        generate_url: where generations are asked for, if not at `url`: a router before several servers.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        request_timeout: float = 600.0,
        control_timeout: float = 120.0,
        tensor_parallel_size: int = 1,
        compare_first_update: bool = False,
        sends_seeds: bool = False,
        diagnose: Callable[[], str] = lambda: "",
        check: Callable[[], None] = lambda: None,
        generate_url: str | None = None,
    ) -> None:
        self._http = HttpVerbs(url, api_key, timeout=control_timeout, diagnose=diagnose, check=check)
        self._generate_url = generate_url or url
        self._request_timeout = request_timeout
        self._control_timeout = control_timeout
        self._silence = Silence(request_timeout)
        self._tensor_parallel_size = tensor_parallel_size
        self._sends_seeds = sends_seeds
        self._asleep: set[str] = set()
        self._updating = False
        self._compare_update = compare_first_update
        self.num_running = 0
        """Generations that have been asked for and not answered."""
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._http.url

    # ---- for the game -------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        """`num_samples` completions of one prompt, in one request: the server computes the prompt once.

        Raises:
            EngineError: the server sleeps, is being updated, refused, died, answered nothing for `request_timeout`, or what it
                answered cannot be.
        """
        self._require_awake("generate")
        body = {"input_ids": list(prompt_ids), "sampling_params": _parameters(sampling, num_samples), "return_logprob": True}
        if self.num_running == 0:
            self._silence.heard()
        self.num_running += 1
        try:
            if self._sends_seeds and sampling.seed is not None:
                if num_samples > 1:  # of the `n` samples of one request the server would compute the prompt first by itself
                    await self._generated(body | {"sampling_params": _parameters(sampling, 1) | {"max_new_tokens": 1}})
                body |= _each_with_its_seed(prompt_ids, sampling, num_samples)
            answer = await self._generated(body)
        finally:
            self.num_running -= 1
        outputs = answer if isinstance(answer, list) else [answer]
        if len(outputs) != num_samples:
            raise EngineError(f"engine {self._http.url}: {num_samples} samples were asked for, {len(outputs)} came")
        try:
            return [_completion(tuple(prompt_ids), output, sampling) for output in outputs]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"was answered with what is no completion ({type(error).__name__}: {error}): {str(answer)[:500]}"
            raise self._http.failure("POST", "/generate", what) from error

    async def abort(self) -> None:
        """Ends every running request, like `abort_all`; `generate` answers what there is of each."""
        await self._post("/abort_request", {"abort_all": True}, self._control_timeout)

    async def close_requests(self) -> None:
        """Closes the connections of the running event loop."""
        if self._session is not None:
            await self._session.close()
        self._session = self._loop = None

    async def _generated(self, body: dict[str, Any]) -> Any:
        """The answer, however long it takes while others come."""
        asked = asyncio.ensure_future(self._post("/generate", body, None))
        try:
            while not (await asyncio.wait([asked], timeout=LOOK))[0]:
                if self._silence.is_too_long():
                    what = f"and {self.num_running - 1} others: none was answered for {self._request_timeout:g} s (rollout.request_timeout)"
                    raise self._http.failure("POST", "/generate", what)
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        answer = asked.result()
        self._silence.heard()
        return answer

    async def _post(self, path: str, body: dict[str, Any], seconds: float | None) -> Any:
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._connections().post(self._generate_url + path, json=body, timeout=timeout) as response:
                return self._http.accept("POST", path, response.status, await response.text(errors="replace"))
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise self._http.failure("POST", path, f"failed ({type(error).__name__}: {str(error) or 'no answer in time'})") from error

    def _connections(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            self._loop = loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the server queues; a limit here would only hide its queue
                headers=self._http.headers,
                trust_env=False,
            )
        return self._session

    # ---- for the trainer ----------------------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether the server takes requests now; False also when nothing listens."""
        try:
            return self._http.call("GET", "/ready", timeout=5.0)[0] == 200
        except EngineError:
            return False

    def wait_ready(self, timeout: float, check: Callable[[], None] = lambda: None) -> None:
        """Returns when the server takes requests. `check` is called meanwhile and may raise.

        Raises:
            EngineError: not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.is_ready():
            check()
            moved()
            if time.monotonic() > deadline:
                raise self._http.failure("GET", "/ready", f"was not answered with 200 within {timeout:g} s of the start")
            time.sleep(0.1)
        # What the server has built by now stays. A collection that walks it takes a third of a second, and on a CPU each
        # `flush_cache` makes one; while it generates, others come by themselves.
        self._http.call("POST", "/freeze_gc", {})

    def flush_cache(self) -> None:
        """Empties the prefix cache; returns when the server is idle, which is the only state in which it will.

        Raises:
            EngineError: still not idle after `control_timeout`.
        """
        deadline = time.monotonic() + self._control_timeout
        while True:
            status, text = self._http.call("POST", "/flush_cache")
            if status == 200:
                return
            if status != 400 or time.monotonic() > deadline:  # 400: not idle
                raise self._http.failure("POST", "/flush_cache", f"was answered with {status}: {text[:500]}")
            time.sleep(0.05)

    def abort_all(self) -> None:
        """Ends every running request; they finish with "abort"."""
        self._http.ask("POST", "/abort_request", {"abort_all": True})

    def pause(self) -> None:
        """Ends every running request and holds back new ones until `resume`."""
        self._http.ask("POST", "/pause_generation", {"mode": "abort"})

    def resume(self) -> None:
        """Undoes `pause`."""
        self._http.ask("POST", "/continue_generation", {})

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """Waits until the server is idle and releases these kinds of memory. (On a CPU the server frees nothing.)"""
        kinds = [kind for kind in kinds if kind not in self._asleep]
        if self._updating:
            raise EngineError(f"engine {self._http.url}: sleep during a weight update; call end_update first")
        if kinds:
            if not self._asleep:
                self.flush_cache()
            self._http.ask("POST", "/release_memory_occupation", {"tags": kinds})
            self._asleep.update(kinds)

    def wake(self, kinds: Sequence[str] = MEMORY) -> None:
        """Takes these kinds of memory back. Their contents are lost: weights must be sent before generating."""
        kinds = [kind for kind in kinds if kind in self._asleep]
        if kinds:
            self._http.ask("POST", "/resume_memory_occupation", {"tags": kinds})
            self._asleep.difference_update(kinds)

    def begin_update(self) -> None:
        """Opens a weight update; waits until the server is idle.

        Raises:
            EngineError: weights are asleep, or an update is open already.
        """
        if WEIGHTS in self._asleep:
            raise EngineError(f"engine {self._http.url}: begin_update while weights are asleep; wake them first")
        if KV_CACHE not in self._asleep:
            self.flush_cache()
        self._http.ask("POST", "/begin_weight_update", {})
        self._updating = True

    def update_bucket(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Overwrites weights by their Hugging Face names; returns when the server has copied them.

        Raises:
            EngineError: outside an update, or the server could not load them (its weights are then undefined), or has
                others afterwards.
        """
        from megatron_spice.rollout import buckets

        bucket = buckets.flatten(named_tensors)
        handles = [bucket.serialise(self._compare_update) for _ in range(self._tensor_parallel_size)]
        body = {"serialized_named_tensors": handles, "load_format": LOADER, "flush_cache": False}
        self._http.ask("POST", "/update_weights_from_tensor", body)

    def end_update(self, version: str) -> None:
        """Closes the update, drops what was cached under the old weights, sets and checks the version."""
        self._http.ask("POST", "/end_weight_update", {})
        self._updating = self._compare_update = False
        if KV_CACHE not in self._asleep:
            self.flush_cache()
        self._http.ask("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False})
        if (found := self.weight_version()) != version:
            raise EngineError(f"engine {self._http.url}: the update was to version {version!r}, it says {found!r}")

    def weight_version(self) -> str:
        """What the last `end_update` set; "default" before the first."""
        return str(self._http.ask("GET", "/model_info")["weight_version"])

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities [length - 1] of `token_ids[1:]`, each given all before it, at temperature 1."""
        self._require_awake("score")
        if len(token_ids) < 2:
            raise ValueError(f"score needs two token ids or more, not {len(token_ids)}")
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = self._http.ask("POST", "/generate", body, timeout=self._request_timeout)
        scored = answer["meta_info"]["input_token_logprobs"]
        # The server calls the last id of its vocabulary 0 here, having scored the right one.
        if len(scored) != len(token_ids) or any(entry[1] not in (sent, 0) for entry, sent in zip(scored, token_ids)):
            raise EngineError(f"engine {self._http.url}: it scored other tokens than the {len(token_ids)} that were sent")
        return [float(entry[0]) for entry in scored[1:]]

    def _require_awake(self, verb: str) -> None:
        if self._asleep or self._updating:
            state = f"its {' and '.join(sorted(self._asleep))} sleep" if self._asleep else "its weights are being updated"
            raise EngineError(f"engine {self._http.url}: {verb} was called while {state}")


def _parameters(sampling: Sampling, num_samples: int) -> dict[str, Any]:
    return {
        "n": num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop),
    }


def _each_with_its_seed(prompt_ids: Sequence[int], sampling: Sampling, num_samples: int) -> dict[str, Any]:
    """A batch instead of `n`, whose samples would all have the one seed of their request, and so be equal."""
    parameters = _parameters(sampling, 1)
    seeds = [sampling.seed_of(index) for index in range(num_samples)]
    return {
        "input_ids": [list(prompt_ids)] * num_samples,
        "sampling_params": [parameters | {"sampling_seed": seed} for seed in seeds],
    }


def _completion(prompt_ids: tuple[int, ...], output: dict[str, Any], sampling: Sampling) -> Completion:
    """From the server's answer for one sample. Text ends before the earliest stop string, even if two came at once.

    The last token of an aborted completion is left out: the server does not look whether it was an end-of-text id, the end
    of a stop string or the last one allowed. What remains can be continued.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: it is not the answer of a working server.
    """
    about = output["meta_info"]
    sampled, finish = about.get("output_token_logprobs") or [], about["finish_reason"]["type"]
    if finish == "abort":
        sampled = sampled[:-1]
    text = output["text"]
    ends = [place for place in map(text.find, sampling.stop) if place >= 0]
    logprobs = tuple(float(entry[0]) for entry in sampled)
    if len(sampled) > sampling.max_new_tokens:
        raise ValueError(f"{len(sampled)} tokens where {sampling.max_new_tokens} were allowed")
    if not all(-math.inf < logprob < 1e-3 for logprob in logprobs):  # a sum of float32 may round to a little over 1
        raise ValueError(f"log-probabilities of {min(logprobs)} to {max(logprobs)}")
    return Completion(
        prompt_ids=prompt_ids,
        completion_ids=tuple(int(entry[1]) for entry in sampled),
        logprobs=logprobs,
        finish=finish,
        text=text[: min(ends)] if ends else text,
        weight_version=str(about["weight_version"]),
    )
