# SPDX-License-Identifier: Apache-2.0
# kvq-capture, and a calibration from what it wrote.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
}

capture() { kvq-capture --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL "$@"; }
calibrate() { kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL "$@"; }

# The layers of an artifact, without where it comes from.
numbers() {
  kvq-export -q "$1" --to json -f -o numbers.json >/dev/null
  awk '/^\t"/ { inside = /"layers"/ } inside' numbers.json
}

@test "capture writes one file, says what it did, and suggests a calibration" {
  succeeds capture --with-fisher -o out.kvqc.h5
  [ "$(ls -A)" = out.kvqc.h5 ]
  contains "$output" "wrote out.kvqc.h5"
  [ "$(wc -l <<<"$output")" -eq 1 ]
  contains "$stderr" "model " "windows " "captures " "squared gradients as f32" "memory " "disk " \
    "next: kvq-calibrate --capture out.kvqc.h5 -o OUT.kvq.h5"
  succeeds capture -o plain.kvqc.h5
  contains "$stderr" "--weighting none"
}

@test "a calibration from a capture finds the same numbers as one from the model" {
  capture --with-fisher --with-query -o a.kvqc.h5
  for how in fisher-scaled none; do
    kvq-calibrate --capture a.kvqc.h5 --weighting $how -o "$how.kvq.h5"
    calibrate --weighting $how -o "$how.model.kvq.h5"
    numbers "$how.kvq.h5" >"$how.captured"
    numbers "$how.model.kvq.h5" >"$how.direct"
    [ "$(wc -c <"$how.direct")" -gt 2000 ]
    cmp "$how.captured" "$how.direct"
  done
  run ! cmp -s none.direct fisher-scaled.direct
}

@test "the same command gives the same bytes, on one thread or two" {
  capture --with-fisher --with-query -o one.kvqc.h5
  capture --with-fisher --with-query -o again.kvqc.h5
  capture --with-fisher --with-query --threads 2 -o two.kvqc.h5
  cmp one.kvqc.h5 again.kvqc.h5
  cmp one.kvqc.h5 two.kvqc.h5
}

@test "f16 takes half of the room, another seed other windows" {
  capture -o wide.kvqc.h5
  capture --dtype f16 -o narrow.kvqc.h5
  capture --seed 1 -o other.kvqc.h5
  [ "$(stat -c %s narrow.kvqc.h5)" -lt "$(stat -c %s wide.kvqc.h5)" ]
  run ! cmp -s wide.kvqc.h5 other.kvqc.h5
}

@test "only the layers that are asked for are captured" {
  capture --layers 1 -o one.kvqc.h5
  capture --layers 0,1-1 -o two.kvqc.h5
  capture -o all.kvqc.h5
  cmp two.kvqc.h5 all.kvqc.h5
  fails 3 kvq-calibrate --capture one.kvqc.h5 --weighting none -o a.kvq.h5
  contains "$stderr" "lacks layer 0 of 2"
}

@test "a fit that needs squared gradients says so when there are none" {
  capture -o plain.kvqc.h5
  fails 3 kvq-calibrate --capture plain.kvqc.h5 -o a.kvq.h5
  contains "$stderr" "no squared gradients" "--weighting none"
}

@test "options that a capture leaves no room for are refused" {
  capture --with-fisher -o a.kvqc.h5
  for option in "--samples 4" "--seq-len 16" "--seed 9" "--bos always" "--memory-limit 1GiB" "--restart" "--work-dir w"; do
    fails 2 kvq-calibrate --capture a.kvqc.h5 $option -o a.kvq.h5
    contains "$stderr" "${option%% *} has no meaning here"
  done
}

@test "an existing output is kept unless --force is given" {
  echo precious >out.kvqc.h5
  fails 2 capture -o out.kvqc.h5
  contains "$stderr" "KVQ-E2002" "out.kvqc.h5"
  [ "$(cat out.kvqc.h5)" = precious ]
  succeeds capture --force -o out.kvqc.h5
  [ "$(ls -A)" = out.kvqc.h5 ]
}

@test "a dry run prints the plan and writes nothing" {
  succeeds capture --with-query --dry-run -o out.kvqc.h5
  contains "$stderr" "captures   2 layers  K V Q as f32" "disk " "memory " "nothing was written"
  [ -z "$output" ]
  [ -z "$(ls -A)" ]
}

@test "wrong options are refused before anything is made" {
  fails 2 capture
  contains "$stderr" "--output"
  fails 2 kvq-capture --text "$SHARED_DIR/text.txt" -o a.kvqc.h5
  contains "$stderr" "--model is missing"
  for list in 2 0-2 1-0 x "" 0, 0-1x -1 0:1; do
    fails 2 capture --layers="$list" -o a.kvqc.h5
    contains "$stderr" "--layers"
  done
  fails 2 capture --dtype f64 -o a.kvqc.h5
  contains "$stderr" "--dtype"
}

@test "a work directory that an unfinished run needs is left alone" {
  mkdir w
  echo '{}' >w/manifest.json
  capture --work-dir w -o a.kvqc.h5 || true
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL --shard 0/2 --work-dir kept -o s.kvqp
  before=$(find kept -type f | sort | xargs sha256sum)
  fails 2 capture --work-dir kept -o b.kvqc.h5
  contains "$stderr" "--work-dir kept" "unfinished run"
  [ "$before" = "$(find kept -type f | sort | xargs sha256sum)" ]
}

@test "a stopped capture leaves nothing behind" {
  kvq-capture --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --samples 4000 --seq-len 32 --threads 1 \
    --with-fisher -o big.kvqc.h5 2>"$BATS_TEST_TMPDIR/log" &
  local pid=$! code=0
  until compgen -G ".big.kvqc.h5.tmp-*" >/dev/null || ! kill -0 $pid; do sleep 0.01; done
  sleep 0.1
  kill -TERM $pid || true
  wait $pid || code=$?
  cat "$BATS_TEST_TMPDIR/log"
  [ "$code" -eq 75 ]
  contains "$(cat "$BATS_TEST_TMPDIR/log")" "big.kvqc.h5 was not written" "--samples 4000"
  [ -z "$(ls -A)" ]
}

@test "what is no capture is refused" {
  echo text >text.kvqc.h5
  fails 3 kvq-calibrate --capture text.kvqc.h5 -o a.kvq.h5
  contains "$stderr" "not an HDF5 file"
  capture --with-fisher -o a.kvqc.h5
  head -c 5000 a.kvqc.h5 >short.kvqc.h5
  fails 4 kvq-calibrate --capture short.kvqc.h5 -o a.kvq.h5
  contains "$stderr" "short.kvqc.h5"
  calibrate -o artifact.kvq.h5
  fails 3 kvq-calibrate --capture artifact.kvq.h5 -o a.kvq.h5
}
