# SPDX-License-Identifier: Apache-2.0
# Runs that are stopped, limited, or spread over shards and processes, on a tiny random checkpoint.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o "$SHARED_DIR/a.kvq.h5"
}

calibrate() { kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL "$@"; }

# Ends a run after that many seconds; many windows make it long enough for that.
LONG="--samples 1000 --seq-len 64"
stop_after() {
  local seconds=$1 pid
  shift
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $LONG --threads 1 "$@" 2>log &
  pid=$!
  until [ -e out.kvq.h5.work/kvq-manifest.json ] || ! kill -0 $pid; do sleep 0.01; done
  sleep "$seconds"
  kill -TERM $pid || true
  code=0
  wait $pid || code=$?
}

@test "a run that is asked to stop saves its state, and the same command continues" {
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $LONG --threads 1 -o whole.kvq.h5
  stop_after 0.1 -o out.kvq.h5
  cat log
  [ "$code" -eq 75 ]
  contains "$(cat log)" "continue with: " "--samples 1000" "saved in out.kvq.h5.work"
  [ ! -e out.kvq.h5 ]
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $LONG --threads 2 -o out.kvq.h5
  contains "$stderr" "continues in out.kvq.h5.work" "steps were finished before"
  cmp out.kvq.h5 whole.kvq.h5
  [ ! -e out.kvq.h5.work ]
}

@test "a stopped run does not go on with other settings, and --restart forgets it" {
  stop_after 0.1 -o out.kvq.h5
  fails 3 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $LONG --threads 1 --bits 2 -o out.kvq.h5
  contains "$stderr" "KVQ-E3004" "k_bits: 3, now 2" "v_bits: 3, now 2" "--restart"
  words 301 >text.txt
  fails 3 kvq-calibrate --model "$SHARED_DIR/model" --text text.txt $LONG --threads 1 -o out.kvq.h5
  contains "$stderr" "KVQ-E3004" "token_ids_sha256: "
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL --restart -o out.kvq.h5
  [ ! -e out.kvq.h5.work ]
}

@test "a run that was killed after writing its artifact ends in a clean-up; another artifact is kept" {
  stop_after 0.1 -o out.kvq.h5
  [ "$code" -eq 75 ]
  cp -r out.kvq.h5.work saved
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $LONG --threads 1 -o out.kvq.h5
  hash=$(grep -o 'content sha256 [0-9a-f]*' <<<"$output" | cut -d' ' -f3)
  cp out.kvq.h5 whole.kvq.h5
  mv saved out.kvq.h5.work
  cp out.kvq.h5.work/kvq-manifest.json manifest
  fails 2 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $LONG --threads 1 -o out.kvq.h5
  contains "$stderr" "KVQ-E2002" "already exists"
  sed "s/\"result\":[[:space:]]*\"\"/\"result\": \"$hash\"/" manifest >out.kvq.h5.work/kvq-manifest.json
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $LONG --threads 1 -o out.kvq.h5
  contains "$stderr" "was complete"
  cmp out.kvq.h5 whole.kvq.h5
  [ ! -e out.kvq.h5.work ]
}

@test "less scratch space gives the same artifact, too little is refused" {
  kvq_make_model_tool deep --layers 9
  succeeds kvq-calibrate --model deep --text "$SHARED_DIR/text.txt" $SMALL -o all.kvq.h5
  succeeds kvq-calibrate --model deep --text "$SHARED_DIR/text.txt" $SMALL --scratch-limit 230KB -o some.kvq.h5
  contains "$stderr" "recomputed"
  cmp all.kvq.h5 some.kvq.h5
  fails 6 kvq-calibrate --model deep --text "$SHARED_DIR/text.txt" $SMALL --scratch-limit 100KB -o few.kvq.h5
  contains "$stderr" "KVQ-E6002" "the least is"
}

@test "a memory limit is met or refused with what would do" {
  fails 6 calibrate --memory-limit 20MiB -o out.kvq.h5
  contains "$stderr" "KVQ-E6001" "the least for windows of this length is" "statistics"
  succeeds calibrate --memory-limit 2GiB -o out.kvq.h5
  contains "$stderr" "memory: peak "
  [[ $stderr != *"above --memory-limit"* ]]
  cmp out.kvq.h5 "$SHARED_DIR/a.kvq.h5"
  fails 2 calibrate --memory-limit much -o other.kvq.h5
  contains "$stderr" "'much' is not a size like 16GiB"
}

@test "shards merge into the bytes of one run" {
  for i in 0 1 2; do succeeds calibrate --shard $i/3 --work-dir w$i -o a$i.kvqp; done
  succeeds kvq-merge a2.kvqp a0.kvqp a1.kvqp -o thresholds.kvqp
  contains "$output" "thresholds of 3 shards"
  for i in 0 1 2; do succeeds calibrate --shard $i/3 --work-dir w$i --thresholds thresholds.kvqp -o b$i.kvqp; done
  [ ! -e w0 ]
  succeeds kvq-merge b0.kvqp b1.kvqp b2.kvqp -o out.kvq.h5
  contains "$output" "from 3 shards" "content sha256"
  cmp out.kvq.h5 "$SHARED_DIR/a.kvq.h5"
}

@test "shards that are missing, doubled, of another run or of another round are refused" {
  for i in 0 1; do succeeds calibrate --shard $i/2 --work-dir w$i -o a$i.kvqp; done
  succeeds calibrate --shard 1/2 --seed 1 --work-dir other -o other.kvqp
  fails 3 kvq-merge a0.kvqp -o out.kvqp
  contains "$stderr" "shard 0 of 2, but 1 files are given"
  fails 3 kvq-merge a0.kvqp a0.kvqp -o out.kvqp
  contains "$stderr" "given twice"
  fails 3 kvq-merge a0.kvqp other.kvqp -o out.kvqp
  contains "$stderr" "KVQ-E3004" "other.kvqp" "seed: 0, now 1"
  fails 3 calibrate --shard 0/2 --work-dir w0 --thresholds a0.kvqp -o b0.kvqp
  contains "$stderr" "a0.kvqp"
  fails 2 calibrate --shard 0/2 -o b0.kvqp
  contains "$stderr" "--work-dir"
  fails 2 calibrate --shard 2/2 --work-dir w2 -o b0.kvqp
  contains "$stderr" "0 <= I < N"
  fails 2 calibrate --thresholds a0.kvqp -o b0.kvqp
  contains "$stderr" "--shard"
  fails 2 kvq-merge -o out.kvqp
}

@test "processes give the bytes of one run" {
  command -v mpirun >/dev/null || skip "no mpirun here"
  export OMPI_MCA_plm=isolated # one machine; otherwise mpirun wants ssh
  local run="mpirun --oversubscribe"
  [ "$(id -u)" -ne 0 ] || run="$run --allow-run-as-root"
  $run -n 1 true 2>/dev/null || skip "mpirun cannot start a process here"
  for n in 1 2 3; do
    run --separate-stderr $run -n $n kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL \
      -o ranks-$n.kvq.h5
    [[ $stderr != *"built without MPI"* ]] || skip "built without MPI"
    show
    [ "$status" -eq 0 ]
    cmp ranks-$n.kvq.h5 "$SHARED_DIR/a.kvq.h5"
    [ ! -e ranks-$n.kvq.h5.work ]
  done
}
