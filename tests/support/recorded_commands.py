"""What a shell script would start: run for real among stand-ins for Slurm, containers and Python that write down how they were
called, with which changes to the environment, and then do what follows from it (srun runs its command once a node, with the part of
the environment that Slurm would give it). In the environment are: STATUS, CHECKPOINT, NOTE and ENDED, how the ranks end, what they have
saved and what their launcher leaves in the run's folder; SIGNALS, what comes to the script while they run, and EARLY before; AWAITED,
a word of what it does at the last of them, without which they do not end; SHOWN, what Slurm says of the job; OWNER, who has taken the
run's folder meanwhile; FAILING, programs that fail; REFUSALS, how often Slurm does not take the job back.

The story is text to compare with a file of tests/snapshots; `pytest --rewrite-snapshots` writes it there instead, to be read in
the diff before it is committed.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOTS = ROOT / "tests" / "snapshots"
PROGRAMS = ("srun", "scontrol", "scancel", "sbatch", "apptainer", "python", "getent", "nproc", "sleep")
_QUIET = {"_", "SHLVL", "PWD", "OLDPWD", "RECORDS", "ANSWER", "SCRIPT"}
_UNTOLD = ("getent", "nproc", "sleep")

_STAND_IN = r"""#!/bin/bash
name="$(basename "$0")"
record() { { flock 9; printf '%s\0' "$@"; printf '\n\0'; env -0; printf '\n\n\0'; } 9>>"$RECORDS" >&9; } # one after the other
record "$name" "$@"
case " $FAILING " in *" $name "*) echo "$name: no answer" >&2; exit 1 ;; esac
case "$name $1 $2" in
  "scontrol show hostnames"*) for ((n = 1; n <= SLURM_JOB_NUM_NODES; n++)); do echo "node$n"; done ;;
  "scontrol show node"*) echo "NodeName=$3 NodeAddr=10.0.0.1 NodeHostName=$3" ;;
  "scontrol show job") echo "$SHOWN" ;;
  "scontrol requeue"*) [ "$(grep -ac requeue "$RECORDS")" -gt "${REFUSALS:-0}" ] || { echo "$name: no answer" >&2; exit 1; } ;;
  "nproc"*) echo 16 ;;
  "getent"*) [ -z "$UNRESOLVED" ]; exit ;;
  "python -m megatron_spice")
    for signal in $EARLY; do kill -s "$signal" "$SCRIPT"; done
    cat "$ANSWER" ;;
  "python -m megatron_spice.launch")
    [ -z "$CHECKPOINT" ] || mkdir -p "$SPICE_RUN_DIR/checkpoints/$CHECKPOINT"
    [ -z "$OWNER" ] || { mkdir -p "$SPICE_RUN_DIR" && echo "{\"attempt\": \"$OWNER\"}" >"$SPICE_RUN_DIR/owner.json"; }
    [ -z "$NOTE" ] || { mkdir -p "$SPICE_RUN_DIR" && echo "$NOTE" >"$SPICE_RUN_DIR/failed_at"; }
    [ -z "$ENDED" ] || { mkdir -p "$SPICE_RUN_DIR" && echo "$ENDED" >"$SPICE_RUN_DIR/ended_at"; }
    for signal in $SIGNALS; do
      kill -s "$signal" "$SCRIPT"
      case "$signal" in USR1) word=scancel ;; *) word="$AWAITED" ;; esac # scancel: srun has been told by then
      for ((tenth = 0; tenth < 500; tenth++)); do ! grep -zqx "$word" "$RECORDS" || break; /bin/sleep 0.1; done
    done
    exit "${STATUS:-0}" ;;
  "python -m megatron_spice.telemetry.rank_logs") echo "first cause: rank 7" ;;
  "srun"*)
    nodes=1 export="$SLURM_EXPORT_ENV" clean=()
    trap 'record "(srun gets SIGUSR1)"' USR1
    for word in "$@"; do case "$word" in --nodes=*) nodes="${word#--nodes=}" ;; --export=*) export="${word#--export=}" ;; esac; done
    [ "$export" != NONE ] || clean=(env -i PATH="$PATH" RECORDS="$RECORDS" ANSWER="$ANSWER")
    while [[ "$1" == --* ]]; do shift; done
    for ((n = 0; n < nodes; n++)); do "${clean[@]}" env SLURM_NODEID=$n "$@" || status=$?; done
    exit "${status:-0}" ;;
  "apptainer exec"*)
    shift
    while [[ "$1" == --* ]]; do [ "$1" != --bind ] || shift; shift; done
    shift
    exec "$@" ;;
esac
"""


class Recorder:
    """A copy of slurm/ in `folder`, with its stand-ins.

    Args:
        launch_environment: what `python -m megatron_spice launch-env` answers.
    """

    def __init__(self, folder: Path, launch_environment: Mapping[str, str]) -> None:
        self.house, self.programs, self._records = folder / "house", folder / "programs", folder / "records"
        for path in ("megatron_spice/__main__.py", "tools/preprocess_corpus.py"):
            (self.house / path).parent.mkdir(parents=True)
            (self.house / path).touch()
        shutil.copytree(ROOT / "slurm", self.house / "slurm")
        self._answer = folder / "answer"
        self._answer.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in launch_environment.items()))
        self.programs.mkdir()
        (self.programs / "stand-in").write_text(_STAND_IN)
        (self.programs / "stand-in").chmod(0o755)
        for name in PROGRAMS:
            (self.programs / name).symlink_to("stand-in")
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").symlink_to(self.programs / "stand-in")
        self._folder = folder

    def story(self, script: str, arguments: Sequence[str], **more: str) -> str:
        """Runs a script of the house with these changes to an almost empty environment; returns what it started."""
        self._records.unlink(missing_ok=True)
        base = {
            "PATH": f"{self.programs}:/usr/bin:/bin", "HOME": "/home/user", "SPICE_VENV": str(self._folder / "venv"),
            "RECORDS": str(self._records), "ANSWER": str(self._answer), **more,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", 'export SCRIPT=$$; exec bash "$@"', "--", script, *arguments], cwd=self.house, env=base, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        told = [f"$ {' '.join([*(f'{name}={shlex.quote(value)}' for name, value in more.items()), 'bash', script, shlex.join(arguments)])}"]
        for words, environment in self._calls():
            if words[0] in _UNTOLD:
                continue
            told.append(shlex.join(words))
            if words[0] == "python" and words[1:3] != ["-m", "megatron_spice"] and words[1] != "-c":
                changes = {name: value for name, value in environment.items() if base.get(name) != value and name not in _QUIET}
                told += [f"    {name}={shlex.quote(value)}" for name, value in sorted(changes.items())]
        told += [f"{stream}: {line}" for stream, text in (("out", done.stdout), ("err", done.stderr)) for line in text.splitlines()]
        text = "\n".join([*told, f"exit code {done.returncode}", ""])
        return text.replace(str(self.house), "/house").replace(str(self._folder), "/tmp/test")

    def _calls(self) -> list[tuple[list[str], dict[str, str]]]:
        calls = []
        for record in self._records.read_text().split("\n\n\0")[:-1] if self._records.exists() else []:
            words, _, environment = record.partition("\n\0")
            pairs = (pair.partition("=") for pair in environment.split("\0") if "=" in pair)
            calls.append((words.split("\0")[:-1], {name: value for name, _, value in pairs}))
        return calls


def assert_as_before(name: str, story: str, rewrite: bool) -> None:
    """Compares a story with its file in tests/snapshots, or writes it there."""
    path = SNAPSHOTS / f"{name}.txt"
    if rewrite:
        path.write_text(story)
    assert path.is_file(), f"no {path}; pytest --rewrite-snapshots writes it"
    assert story == path.read_text(), f"{path.name} differs; if it should, pytest --rewrite-snapshots"
