from __future__ import annotations

from pathlib import Path

import json
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.cluster.topology import Topology
from megatron_spice.config import server_keys
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.schema import RolloutConfig
from megatron_spice.rollout.placement import cpu_binding, hosted_engine, remote_engines, server_settings, threads_per_rank


@given(st.integers(1, 64).flatmap(lambda ranks: st.tuples(st.just(ranks), st.integers(1, ranks))))
def test_every_engine_has_one_host_and_an_equal_share_of_ranks(layout: tuple[int, int]) -> None:
    ranks, engines = layout
    hosts = [hosted_engine(rank, ranks, engines) for rank in range(ranks)]
    assert [engine for engine in hosts if engine is not None] == list(range(engines))
    places = [rank for rank, engine in enumerate(hosts) if engine is not None]
    assert places == [engine * (ranks // engines) for engine in range(engines)]


def test_more_engines_than_ranks_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ValueError, match="rollout.engines_per_node=3.*set it to 2"):
        hosted_engine(0, 2, 3)


def settings(device: str, **config: object) -> dict:
    topology = Topology(rank=5, world_size=8, local_rank=1, local_world_size=4, device=device)
    return server_settings(RolloutConfig(**config), topology, "bf16", Path("m"), port=1, rendezvous_port=2)


def test_an_engine_listens_on_loopback_only_and_gets_no_weights_from_disk() -> None:
    for device in ("cpu", "cuda"):
        server = settings(device)["server"]
        assert server["host"] == "127.0.0.1" and server["load_format"] == "dummy" and server["dtype"] == "bfloat16"
        assert "api_key" not in server  # other users of the machine can read a command line


def test_more_of_the_servers_settings_can_be_given_but_not_those_that_others_rely_on() -> None:
    for device in ("cpu", "cuda"):
        assert settings(device, server={"schedule_policy": "fcfs"})["server"]["schedule_policy"] == "fcfs"
        for name in ("port", "load_format", "api_key"):
            with pytest.raises(ConfigError, match=f"rollout.server.{name}=1 is set by this program"):
                settings(device, server={name: 1})
    for name in ("dp_size", "detokenizer_worker_num"):  # what they start could not be forked
        assert settings("cuda", server={name: 2})["server"][name] == 2
        with pytest.raises(ConfigError, match=f"rollout.server.{name}=2 is set by this program"):
            settings("cpu", server={name: 2})


def test_the_settings_that_a_recipe_may_not_give_are_those_that_are_made() -> None:
    for device in ("cpu", "cuda"):
        assert settings(device)["server"].keys() | {"api_key"} == server_keys.ALWAYS | server_keys.ON[device]
    topology = Topology(device="cpu")
    made = server_settings(RolloutConfig(weights="fp8"), topology, "fp8", Path("m"), port=1, rendezvous_port=2, quantization={})
    assert server_keys.QUANTIZED in made["server"]


def test_an_engine_samples_by_seeds_only_if_asked() -> None:
    for asked in (False, True):
        assert settings("cuda", deterministic=asked)["server"]["enable_deterministic_inference"] is asked


def test_engines_of_different_ranks_sample_differently() -> None:
    assert settings("cpu", seed=10)["server"]["random_seed"] == 15


def test_an_accelerated_engine_begins_at_its_hosts_device() -> None:
    plan = settings("cuda")
    assert plan["cpu_threads"] is None and plan["server"]["base_gpu_id"] == 1 and plan["server"]["enable_memory_saver"]


def test_threads_are_what_is_configured_or_a_share_of_the_cores() -> None:
    assert threads_per_rank(RolloutConfig(threads=3)) == 3
    assert threads_per_rank(RolloutConfig(engines_per_node=1000)) == 1


def test_ranks_of_a_cpu_engine_get_cores_of_their_own_while_there_are_enough() -> None:
    assert cpu_binding([0, 1, 2, 3], ranks=2, threads=2) == "0,1|2,3"
    assert cpu_binding([4, 6], ranks=2, threads=1) == "4|6"
    assert cpu_binding([0], ranks=2, threads=1) == "0|0"
    assert "cpu_binding" not in settings("cpu") and "|" in settings("cpu", tensor_parallel_size=2)["cpu_binding"]


def test_servers_that_run_already_are_spread_over_all_ranks() -> None:
    urls = [f"http://gpu{number}:30000" for number in range(5)]
    assert [remote_engines(rank, 8, urls[:2]) for rank in range(8)] == [urls[:1], [], [], [], urls[1:2], [], [], []]
    shares = [remote_engines(rank, 2, urls) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == urls and {len(share) for share in shares} == {2, 3}


def test_an_engine_is_told_of_fp8_weights_in_its_models_config():
    plain = server_settings(RolloutConfig(), Topology(), "fp8", Path("m"), port=1, rendezvous_port=2)["server"]
    told = server_settings(
        RolloutConfig(), Topology(), "fp8", Path("m"), port=1, rendezvous_port=2, quantization={"quant_method": "fp8"}
    )["server"]
    assert "json_model_override_args" not in plain
    assert json.loads(told["json_model_override_args"]) == {"quantization_config": {"quant_method": "fp8"}}
