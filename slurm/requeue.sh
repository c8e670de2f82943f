# shellcheck shell=bash disable=SC2154
# Whether a job of slurm/spice.sh is to be started again, and starting it again; sourced by it. The folder is SPICE_RUN_DIR, `before`
# its newest checkpoint when the ranks were started, `owner_before` whose it was then, and `status` what they have ended with.
#
# Each question has a time limit: neither a file system nor a controller that gives no answer may keep a job that has ended.

# Nothing where there is none; fails where the file system does not answer (124).
newest_checkpoint() {
  { timeout 60 find "$SPICE_RUN_DIR/checkpoints" -maxdepth 1 -name 'iteration_*' ! -name '*.partial' 2>/dev/null || [ $? -ne 124 ]; } |
    sort | tail -n 1
}

has_come_further() {
  local newest
  newest="$(newest_checkpoint)" && [ "$newest" != "$before" ]
}

# Whether ranks of this start have failed by themselves: their launcher has noted it (megatron_spice/launch.py).
has_failed_by_itself() {
  [ "$(timeout 60 cat "$SPICE_RUN_DIR/failed_at" 2>/dev/null)" = "job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0}" ]
}

# A launcher ends by a signal if somebody else sends it (a node's daemon that clears up after another start, an operator): that says
# nothing of the run, but the second time at one checkpoint it may. It also does where srun ends it because another node's has failed.
is_killed_here_first() {
  local file="$SPICE_RUN_DIR/killed_at" place
  [ "$status" -gt 128 ] && ! has_failed_by_itself && place="job $SLURM_JOB_ID at $(newest_checkpoint)" &&
    [ "$(timeout 60 cat "$file" 2>/dev/null)" != "$place" ] && echo "$place" 2>/dev/null >"$file"
}

# Whether what ends this job is its time limit, and not a user or a preemption (of which Slurm takes care) after the warning.
is_out_of_time() {
  case "$(timeout 60 scontrol show job "$SLURM_JOB_ID")" in
    *Reason=TimeLimit* | *JobState=TIMEOUT* | '') true ;;
    *) false ;;
  esac
}

# Which start the folder belongs to (megatron_spice/checkpoint/ownership.py); nothing where none has taken it.
folder_belongs_to() {
  timeout 60 sed -n 's/.*"attempt": "\([^"]*\)".*/\1/p' "$SPICE_RUN_DIR/owner.json" 2>/dev/null || true
}

# For some minutes: the controller may be just failing over.
requeue() {
  local owner shown restarts try
  for try in {1..20}; do
    [ "$try" -eq 1 ] || sleep 15 || true
    owner="$(folder_belongs_to)"
    shown="$(timeout 60 scontrol show job "$SLURM_JOB_ID")" || true
    restarts="$(sed -n 's/.*Restarts=\([0-9]*\).*/\1/p' <<<"$shown")"
    if [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then # a node was lost and this shell was not
      echo "spice.sh: Slurm has requeued this job already"
      return
    elif [ "$owner" != "$owner_before" ] && [[ "$owner" != "job $SLURM_JOB_ID "* ]]; then
      echo "spice.sh: not requeued: $SPICE_RUN_DIR belongs to $owner by now"
      return
    elif [[ "$shown" == *Requeue=0* || "$shown" == *BatchFlag=0* ]]; then
      echo "spice.sh: not requeued: that takes sbatch, without --no-requeue"
      return
    elif timeout 60 scontrol requeue "$SLURM_JOB_ID"; then
      printf 'spice.sh: requeued (restart %d)\n' "$((${SLURM_RESTART_COUNT:-0} + 1))"
      return
    fi
  done
  echo "spice.sh: Slurm has not taken this job back; by hand: scontrol requeue $SLURM_JOB_ID"
}
