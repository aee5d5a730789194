#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Ends a calibration again and again at random moments, lets the same command finish it, and compares the artifact with
# that of a run nobody disturbed. Prints a table; exits 1 when any artifact differs, a run failed, or something was
# left behind.
#
#   bench/kill_test.sh MODEL TEXT [N_KILL [N_TERM [OPTION OF kvq-calibrate]...]]
#   bench/kill_test.sh model text.txt 50 20 --samples 16 --seq-len 256
#
# N_KILL trials (50) with SIGKILL, N_TERM (20) with SIGTERM; each trial is ended one to three times. SEED=N in the
# environment decides the moments (1), KVQ_BIN names the folder of the programs (build/bin).
set -euo pipefail

[ $# -ge 2 ] || {
  sed -n 's/^# \{0,1\}//; 3,12p' "$0" >&2
  exit 2
}
model=$1 text=$2 n_kill=${3:-50} n_term=${4:-20}
shift $(($# < 4 ? $# : 4))
options=("$@")
RANDOM=${SEED:-1}
calibrate=${KVQ_BIN:-$(dirname "$0")/../build/bin}/kvq-calibrate
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/run"
out=$folder/run/out.kvq.h5 log=$folder/log

# The command that is ended and repeated. It must not change: a different one is not a continuation.
command=("$calibrate" --model "$model" --text "$text" "${options[@]}" --progress json -o "$out")

now() { date +%s.%N; }
calc() { awk "BEGIN { printf \"%.4f\", ($1) }"; }

# Where the run was: the stage of the last event. Before the first one it is still reading; a stage that is complete
# is followed by the fit or by writing.
stage() {
  sed -n 's/.*"event":"progress","stage":"\([a-z-]*\)".*"percent":\([0-9.]*\).*/\1 \2/p' "$log" | tail -n 1 |
    awk '{ print ($2 == 100 ? "after-" : "") $1; found = 1 } END { if (!found) print "start" }'
}

# run_for SECONDS SIGNAL: starts the command, sends the signal after that time; its exit code is in $code.
run_for() {
  local pid
  "${command[@]}" >/dev/null 2>"$log" &
  pid=$!
  sleep "$1"
  kill "-$2" "$pid" 2>/dev/null || true
  code=0
  { wait "$pid"; } 2>/dev/null || code=$?
}

declare -A hits
same=0 different=0 failed=0 left_behind=0 n_hits=0

# The signal came after the last thing to do: there is nothing to continue, the same command would not overwrite.
is_complete() { [ "$(ls -A "$folder/run")" = out.kvq.h5 ]; }

report_failure() {
  echo "$1" >&2
  tail -n 3 "$log" >&2
  failed=$((failed + 1))
}

# trial SIGNAL CODE: ends the run one to three times, then lets it finish. Not counted (status 1) when it was over
# before the first signal came.
trial() {
  local signal=$1 expected=$2 wanted=$((RANDOM % 3 + 1)) hit=0 left=$run_s seconds where
  rm -rf "$folder/run"
  mkdir "$folder/run"
  while [ $hit -lt $wanted ]; do
    seconds=$(calc "$left * $RANDOM / 32768")
    run_for "$seconds" "$signal"
    [ "$code" -ne 0 ] || break # it was done
    # a program that has not said a word yet does not listen to signals either, and has nothing to save
    if [ "$code" -ne "$expected" ] && ! { [ "$code" -gt 128 ] && [ ! -s "$log" ]; }; then
      report_failure "SIG$signal after $seconds s: exit code $code, expected $expected"
      return 0
    fi
    where="$signal $(stage)"
    hits[$where]=$((${hits[$where]:-0} + 1))
    hit=$((hit + 1))
    ! is_complete || break
    left=$(calc "$left - $seconds > 0.05 * $run_s ? $left - $seconds : 0.05 * $run_s")
  done
  [ $hit -gt 0 ] || return 1
  n_hits=$((n_hits + hit))
  if [ "$code" -ne 0 ] && ! is_complete && ! "${command[@]}" >/dev/null 2>"$log"; then
    report_failure "after $hit times SIG$signal the run could not be continued"
  elif cmp -s "$out" "$folder/undisturbed.kvq.h5"; then
    same=$((same + 1))
  else
    echo "after $hit times SIG$signal the artifact differs" >&2
    different=$((different + 1))
  fi
  is_complete || left_behind=$((left_behind + 1))
}

"${command[@]}" >/dev/null 2>"$log" # warms the file cache, and shows that it works at all
mv "$out" "$folder/first.kvq.h5"
start=$(now)
"${command[@]}" >/dev/null 2>"$log"
run_s=$(calc "$(now) - $start")
mv "$out" "$folder/undisturbed.kvq.h5"
cmp "$folder/first.kvq.h5" "$folder/undisturbed.kvq.h5"
echo "undisturbed run: $run_s s, $(sha256sum <"$folder/undisturbed.kvq.h5" | cut -d' ' -f1)"

printf '%-8s %7s %9s %9s %9s %7s %12s\n' signal trials signals same different failed left-behind
bad=0
for round in "KILL $n_kill 137" "TERM $n_term 75"; do
  read -r signal n_trials expected <<<"$round"
  same=0 different=0 failed=0 left_behind=0 n_hits=0
  for ((i = 0; i < n_trials; i++)); do
    until trial "$signal" "$expected"; do :; done
  done
  printf '%-8s %7d %9d %9d %9d %7d %12d\n' "SIG$signal" "$n_trials" $n_hits $same $different $failed $left_behind
  bad=$((bad + different + failed + left_behind))
done

echo
echo "signals by stage:"
for where in "${!hits[@]}"; do printf '  %-24s %4d\n' "$where" "${hits[$where]}"; done | sort
[ $bad -eq 0 ]
