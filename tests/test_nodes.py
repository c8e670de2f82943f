"""One node of four ranks and two nodes of two learn the same: real launchers as slurm/spice.sh starts them, one a node, which meet
on loopback; the same trajectories, two optimiser steps, loss and gradient norm to 1e-4.

Which ranks share a node decides who is a neighbour in tensor and data parallel groups, and on which rank a node's engine is.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_models import make_model, some_trajectories

ROOT = Path(__file__).resolve().parents[1]
TENSOR_AND_PIPELINE = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
TENSOR_AND_DATA = {"tensor_parallel_size": 2}
pytestmark = pytest.mark.timeout(240)


def train_on(nodes: int, folder: Path, jobs: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """The metrics of every update of each job, as each rank has them: [rank][job]."""
    folder.mkdir()
    (folder / "request").write_bytes(pickle.dumps((str(ROOT / "tests" / "policy" / "on_ranks.py"), "in_layouts", (jobs,))))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def launch(node: int) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "PET_NODE_RANK": str(node), "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        command = [sys.executable, "-m", "megatron_spice.launch", f"--nnodes={nodes}", f"--nproc-per-node={4 // nodes}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(ROOT / "tests" / "support" / "ranks.py")]
        command += [str(folder / "request"), str(folder)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)

    with ThreadPoolExecutor(nodes) as pool:
        for done in pool.map(launch, range(nodes)):
            assert done.returncode == 0, done.stderr[-4000:]
    results = [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(4)]
    return [[job["updates"] for job in result] for result in results]


def test_two_nodes_of_two_ranks_learn_what_one_of_four_does(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hf", "llama", tied=True)
    # A loss that depends on the weights of its step, which the policy gradient's alone does not.
    settings = {"tokens_per_microbatch": 24, "kl_coefficient": 0.1, "entropy_bonus": 0.02}
    jobs = [
        {"model": str(model), "trajectories": some_trajectories(groups=7), "updates": 2, "overrides": {"policy": layout | settings}}
        for layout in (TENSOR_AND_PIPELINE, TENSOR_AND_DATA)
    ]
    one, two = train_on(1, tmp_path / "one", jobs), train_on(2, tmp_path / "two", jobs)
    assert all(result == one[0] for result in one[1:]), "every rank has the same metrics"
    assert all(result == two[0] for result in two[1:])
    for single, several in zip(one[0], two[0], strict=True):
        assert len(single) == 2 and single[0]["policy/loss"] != single[1]["policy/loss"], "the first step has changed something"
        for before, after in zip(single, several, strict=True):
            for name in ("policy/loss", "policy/grad_norm", "policy/kl"):
                assert after[name] == pytest.approx(before[name], rel=1e-4)
    apart = [metrics["policy/grad_norm"] for metrics in one[0][0]], [metrics["policy/grad_norm"] for metrics in one[0][1]]
    assert apart[0] == pytest.approx(apart[1], rel=1e-4), "and so do both layouts"
