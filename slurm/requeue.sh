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

# What a launcher of this start has noted (megatron_spice/launch.py): that its ranks have failed by themselves, or have ended in order.
has_noted() {
  [ "$(timeout 60 cat "$SPICE_RUN_DIR/$1" 2>/dev/null)" = "job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0}" ]
}

# The first launcher that ends in order has srun kill those of the other nodes, and the highest exit code is srun's.
has_ended_in_order() {
  [ "$status" -gt 128 ] && has_noted ended_at && ! has_noted failed_at
}

# A launcher ends by a signal if somebody else sends it (a node's daemon that clears up after another start, an operator): that says
# nothing of the run, but the second time at one checkpoint it may. It also does where srun ends it because another node's has failed.
# The same if another process had its port (76): the next start has another one.
is_killed_here_first() {
  local file="$SPICE_RUN_DIR/killed_at" place
  { [ "$status" -gt 128 ] || [ "$status" -eq 76 ]; } && ! has_noted failed_at && place="job $SLURM_JOB_ID at $(newest_checkpoint)" &&
    [ "$(timeout 60 cat "$file" 2>/dev/null)" != "$place" ] && echo "$place" 2>/dev/null >"$file"
}

# Whether this is the third time limit at the same checkpoint: the next start would come no further either. A warning in the job's
# last hour is of its limit; before, a preemption (send_user_signal) or a user has sent it. Asked once a start, for it is counted.
is_limit_too_short() {
  local file="$SPICE_RUN_DIR/warned_at" newest
  [ "$((${SLURM_JOB_END_TIME:-0} - $(date +%s)))" -lt 3600 ] && newest="$(newest_checkpoint)" && [ "$newest" = "$before" ] &&
    timeout 60 mkdir -p "$SPICE_RUN_DIR" 2>/dev/null && echo "job $SLURM_JOB_ID at $newest" 2>/dev/null >>"$file" &&
    [ "$(grep -cxF "job $SLURM_JOB_ID at $newest" "$file")" -ge 3 ] || return 1
  echo "spice.sh: not requeued: three time limits passed without a saved iteration;" \
    "give a longer --time, or --signal=B:USR1@SECONDS as --dry-run says"
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
