"""What slurm/benchmark.sh starts, in every way it may be called, compared with tests/snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_commands import SNAPSHOTS, Recorder, assert_as_before

CUDA = {"SPICE_RANKS_PER_NODE": "8", "SPICE_DEVICE_KIND": "cuda", "SPICE_RUN_DIR": "runs/my run", "SPICE_TUNABLES": "a.tunable=1"}
TWO = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
CALL = ["--output", "out", "a recipe.yaml", "run.dir=runs/my run"]
PYXIS = "export SPICE_CONTAINER=registry/image:1 SPICE_MOUNTS=/scratch:/scratch\n"
FIRST_FAILS = 'STATUS=0; [ "$SLURM_JOB_NUM_NODES" != 1 ] || STATUS=1; export STATUS\n'

# What node_benchmark.py would tell a run to override, nothing for those that are COMPLETE; and what it ends with when it has COLLECTED.
NODE_BENCHMARK = """  "python "*"/tools/node_benchmark.py overrides")
    [[ " $COMPLETE " == *" $6 "* ]] || printf '%s\\n' "run.dir=/runs/my $4-$6" "train.iterations=$(($8 + 1))" ;;
  "python "*"/tools/node_benchmark.py collect") exit "${COLLECTED:-0}" ;;
"""

# name -> arguments, environment, site file
CASES = {
    "benchmark-nodes": (CALL, TWO, ""),
    "benchmark-pyxis": (["--nodes-list", "2", "--iterations", "3", *CALL], TWO, PYXIS),
    "benchmark-apptainer": (["--nodes-list", "2", *CALL], TWO | {"SPICE_CONTAINER": "slurm/spice.sh"}, ""),
    "benchmark-one-fails": (CALL, TWO, FIRST_FAILS),
    "benchmark-told-to-end": (CALL, TWO | {"STATUS": "75", "SHOWN": "Requeue=0 Restarts=0 BatchFlag=1"}, ""),
    "benchmark-again": (CALL, TWO | {"COMPLETE": "1"}, ""),
    "benchmark-not-collected": (CALL, TWO | {"COMPLETE": "1 2", "COLLECTED": "1"}, ""),
    "benchmark-refused": (CALL, TWO | {"FAILING": "python"}, ""),
    "benchmark-more-nodes-than-there-are": (["--nodes-list", "2,4", *CALL], TWO, ""),
    "benchmark-ranks": (CALL, {}, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_starts_what_it_did(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments, environment, site = CASES[name]
    recorder = Recorder(tmp_path, CUDA)
    (recorder.house / "tools" / "node_benchmark.py").touch()
    stand_in = recorder.programs / "stand-in"
    stand_in.write_text(stand_in.read_text().replace('case "$name $1 $2" in\n', f'case "$name $1 $2" in\n{NODE_BENCHMARK}', 1))
    if site:
        (recorder.house / "slurm" / "site.sh").write_text(site)
    assert_as_before(name, recorder.story("slurm/benchmark.sh", arguments, **environment), request.config.getoption("--rewrite-snapshots"))


def test_every_snapshot_belongs_to_a_case() -> None:
    assert {path.stem for path in SNAPSHOTS.glob("benchmark-*.txt")} == set(CASES)
