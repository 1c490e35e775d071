# shellcheck shell=sh
# The end of a batch script, after the job's processes have ended: asks Slurm to start the job
# again where that is wanted. It stands in the script itself, since the shared folder may be
# missing on the node. What it needs is assigned before it:
#
#   code        exit code of the job's processes
#   submission  folder of the submission
#   budget      how often the job may be started again
#   excluded    nodes that the profile excludes, comma separated, or nothing
#
# Exit code 75 is the job's own wish; above 128 a signal has ended its process. A job whose
# process did not even begin (no interpreter, no container, no shared folder on this node) is
# tried on other nodes, three times. Every request names one element of an array:
# SLURM_JOB_ID alone is, of one element, the number of the whole array.
: "${code:?}" "${submission:?}" "${budget:?}" "${excluded?}"
me="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
restarts="${SLURM_RESTART_COUNT:-0}"
faulty="$submission/exclude-$me"

# Until the controller takes the request, for twenty minutes; not if Slurm has requeued the job
# itself meanwhile (then its count of restarts has grown), or a person has cancelled it.
requeue() {
  tries=0
  while [ "$tries" -lt 240 ]; do
    tries=$((tries + 1))
    job=$(scontrol show job --oneliner "$me" 2>/dev/null)
    case "$job" in
      "") sleep 5; continue ;;
      *JobState=CANCELLED*) return ;;
    esac
    counted=$(printf '%s' "$job" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p')
    if [ -n "$counted" ] && [ "$counted" -ne "$restarts" ]; then return; fi
    scontrol requeue "$me" && return
    sleep 5
  done
}

again=no
if [ "$code" -ne 0 ] && [ ! -e "$submission/started/$me-$restarts" ]; then
  echo "$SLURMD_NODENAME" >> "$faulty"
  if [ "$restarts" -lt "$budget" ] && [ "$restarts" -lt 3 ]; then again=yes; fi
elif [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; then
  if [ "$restarts" -lt "$budget" ]; then again=yes; fi
fi
if [ "$again" = yes ]; then
  rm -f "$submission/jobs/$me"_*.save_tmp # what submitit was saving when it was killed
  requeue
  if [ -s "$faulty" ]; then # the new list replaces the one before
    scontrol update JobId="$me" ExcNodeList="${excluded:+$excluded,}$(sort -u "$faulty" | paste -sd, -)"
  fi
  sleep 120 # Slurm ends this script when it requeues the job
fi
exit "$code"
