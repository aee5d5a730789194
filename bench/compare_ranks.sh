#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One calibration, spread in every way: threads, MPI processes, shards that are merged. Prints the content hash of each
# artifact and whether its file is the same as that of one thread; exits 1 when one is not.
#
#   bench/compare_ranks.sh MODEL TEXT [OPTION OF kvq-calibrate]...
#   bench/compare_ranks.sh model text.txt --samples 16 --seq-len 256
#
# KVQ_BIN names the folder of the programs (build/bin), MPIRUN the command that starts processes ("mpirun
# --oversubscribe"; as root add --allow-run-as-root). Without it those rows are skipped, and say so.
set -euo pipefail

[ $# -ge 2 ] || {
  sed -n 's/^# \{0,1\}//; 3,11p' "$0" >&2
  exit 2
}
model=$1 text=$2
shift 2
options=("$@")
bin=${KVQ_BIN:-$(dirname "$0")/../build/bin}
read -ra mpirun <<<"${MPIRUN:-mpirun --oversubscribe}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
bad=0

calibrate=("$bin/kvq-calibrate" --model "$model" --text "$text" "${options[@]}" --quiet)

# compare NAME COMMAND...: runs it; its artifact must be $folder/NAME.kvq.h5.
compare() {
  local name=$1 start=$SECONDS verdict=same hash
  shift
  if ! "$@" >/dev/null 2>"$folder/log"; then
    printf '%-12s FAILED\n' "$name"
    cat "$folder/log" >&2
    bad=1
    return
  fi
  hash=$("$bin/kvq-inspect" --quiet --check "$folder/$name.kvq.h5" | grep -o '[0-9a-f]\{64\}')
  if ! cmp -s "$folder/$name.kvq.h5" "$folder/threads-1.kvq.h5"; then
    verdict=DIFFERENT
    bad=1
  fi
  printf '%-12s %-10s %s %5d s\n' "$name" $verdict "$hash" $((SECONDS - start))
}

# run_round N NAME OUTPUT [OPTION]...: every shard, one after the other, then their merge.
run_round() {
  local n=$1 name=$2 output=$3 i files=()
  shift 3
  for ((i = 0; i < n; i++)); do
    files+=("$folder/$name-$i-$n.kvqp")
    "${calibrate[@]}" --shard "$i/$n" --work-dir "$folder/work-$i-$n" "$@" -o "${files[-1]}" || return
  done
  "$bin/kvq-merge" "${files[@]}" -o "$output"
}

run_shards() {
  local n=$1
  run_round "$n" ends "$folder/thresholds-$n.kvqp" &&
    run_round "$n" histograms "$folder/shards-$n.kvq.h5" --thresholds "$folder/thresholds-$n.kvqp"
}

for n in 1 2; do compare "threads-$n" "${calibrate[@]}" --threads $n -o "$folder/threads-$n.kvq.h5"; done
if "${mpirun[@]}" -n 1 true >/dev/null 2>&1; then
  for n in 1 2 3; do compare "ranks-$n" "${mpirun[@]}" -n $n "${calibrate[@]}" --threads 1 -o "$folder/ranks-$n.kvq.h5"; done
else
  echo "ranks        skipped: '${mpirun[*]}' cannot start a process here"
fi
for n in 2 3; do compare "shards-$n" run_shards $n; done
exit $bad
