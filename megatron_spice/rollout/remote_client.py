"""What only servers are asked that somebody else runs: who they are, whether they live, and to join a broadcast group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_spice.rollout.client import EngineClient
from megatron_spice.rollout.engine import EngineError, EngineRefused


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says of itself: `context` is its longest prompt plus completion, `num_ranks` its tensor-parallel ranks, all
    of which join a broadcast group; `device` "cpu" or "cuda"; `tokenizer` is where it has its own from, "" if it does not say."""

    model: str
    weight_version: str
    tokenizer: str
    family: str
    context: int
    num_ranks: int
    device: str
    samples_by_seeds: bool
    obstacles: tuple[str, ...]
    """Why weights cannot be broadcast to it; empty if they can."""


class RemoteClient(EngineClient):
    """The client of one such server; arguments as for `EngineClient`."""

    def identity(self) -> Identity:
        """Asks the server who it is.

        Raises:
            EngineError: no answer, a wrong key, or not an SGLang server.
        """
        info, model = self._http.ask("GET", "/server_info"), self._http.ask("GET", "/model_info")
        models = self._http.ask("GET", "/v1/models")
        try:
            obstacles = [f"{key} is {info[key]}, not 1" for key in ("pp_size", "dp_size") if info.get(key, 1) != 1]
            if info.get("disaggregation_mode", "null") != "null":
                obstacles.append("it is one half of a disaggregated pair")
            if not model["is_generation"]:
                obstacles.append("its model does not generate")
            return Identity(
                model=str(model["model_path"]),
                weight_version=str(model["weight_version"]),
                tokenizer=str(model.get("tokenizer_path") or ""),
                family=str(model["model_type"]),
                context=int(models["data"][0]["max_model_len"]),
                num_ranks=int(info["tp_size"]),
                device=str(info["device"]),
                samples_by_seeds=bool(info.get("enable_deterministic_inference")),
                obstacles=tuple(obstacles),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"did not come from an SGLang server of a release known here ({type(error).__name__}: {error})"
            raise self._http.failure("GET", "/server_info", what) from error

    def has_token(self, token_id: int) -> bool:
        """Whether the server's vocabulary has this id. (It does not tell its size, but refuses ids beyond it.)"""
        body = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "token_ids_logprob": [token_id],
        }
        try:
            self._http.ask("POST", "/generate", body, timeout=self._request_timeout)
        except EngineRefused:
            return False
        return True

    def has_vocabulary(self, size: int) -> bool:
        """Whether the server's vocabulary has ids up to `size` - 1 and no others."""
        return self.has_token(size - 1) and not self.has_token(size)

    def is_alive(self, timeout: float) -> bool:
        """Whether its scheduler answers within `timeout` seconds; one that works answers between two steps."""
        try:
            return self._http.call("GET", "/health", timeout=timeout)[0] == 200
        except EngineError:
            return False

    def end_stale_update(self) -> None:
        """Closes an update that somebody, perhaps this run before it was killed, has left open, if there is one."""
        self._http.call("POST", "/end_weight_update", {})
        self._updating = False

    def join_group(
        self, name: str, address: str, port: int, *, first_rank: int, world_size: int, backend: str, timeout: float
    ) -> None:
        """All ranks of the server join a group; returns when the group is whole."""
        body = {
            "group_name": name, "master_address": address, "master_port": port, "rank_offset": first_rank,
            "world_size": world_size, "backend": backend,
        }  # fmt: skip
        self._http.ask("POST", "/init_weights_update_group", body, timeout=timeout)

    def leave_group(self, name: str, timeout: float) -> None:
        """All ranks of the server leave a group."""
        self._http.ask("POST", "/destroy_weights_update_group", {"group_name": name}, timeout=timeout)

    def receive(self, name: str, contents: dict[str, Any], timeout: float) -> None:
        """The server takes part in one broadcast of a group and loads what came; returns when it has.

        Args:
            contents: names, dtypes and shapes of the tensors, as `broadcast.Packed` gives them.
        """
        body = {**contents, "group_name": name, "load_format": "flattened_bucket", "flush_cache": False}
        self._http.ask("POST", "/update_weights_from_distributed", body, timeout=timeout)
