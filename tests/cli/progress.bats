# SPDX-License-Identifier: Apache-2.0
# What a run shows on stderr while it works, on a terminal, in a log and to a program, and how it is stopped.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o "$SHARED_DIR/a.kvq.h5"
}

calibrate() { kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL "$@"; }

# events FILE: the names of its events, one per line of the file. Any line that is not one JSON object in UTF-8 fails.
events() {
  python3 - "$1" <<'PYTHON'
import json, sys
for line in open(sys.argv[1], "rb"):
    event = json.loads(line.decode("utf-8", "strict"), parse_constant=lambda name: sys.exit(name + " is not JSON"))
    known = {"log": ["level", "text"], "next": ["command"], "stopping": ["text"],
             "progress": ["stage", "layer", "n_layers", "done", "total", "percent", "elapsed_s", "remaining_s", "rss_bytes"],
             "error": ["code", "exit_code", "message", "why", "next"],
             "stopped": ["code", "exit_code", "message", "why", "next", "command"]}[event["event"]]
    if sorted(event) != sorted(known + ["event"]):
        sys.exit(f"keys {sorted(event)}")
    print(event["event"])
PYTHON
}

needs_python() { python3 --version >/dev/null 2>&1 || skip "no python3 to read JSON with"; }

# lacks PATTERN FILE (a bare `! grep` would not fail a test)
lacks() { if grep -aE -- "$1" "$2"; then return 1; fi; }

# event_line FILE NAME: the first event of that name.
event_line() { grep -m 1 "\"event\":\"$2\"" "$1"; }

@test "--progress json: every line of a run is an event" {
  needs_python
  calibrate --progress json -o out.kvq.h5 2>log >result
  events log >names
  [ "$(sort -u names | xargs)" = "log next progress" ]
  cmp out.kvq.h5 "$SHARED_DIR/a.kvq.h5"
  contains "$(cat result)" "wrote out.kvq.h5"
  for stage in forward loss backward; do grep -q "\"stage\":\"$stage\"" log; done
  grep '"stage":"backward"' log | tail -n 1 >last
  [ "$(kvq_json_tool percent <last)" = 100 ]
  [ "$(kvq_json_tool done <last)" = "$(kvq_json_tool total <last)" ]
  [ "$(kvq_json_tool remaining_s <last)" = 0 ]
  [ "$(kvq_json_tool rss_bytes <last)" -gt 1000000 ]
  [ "$(kvq_json_tool n_layers <last)" = "$(kvq-inspect -q --json out.kvq.h5 | kvq_json_tool layers)" ]

  kvq-validate --progress json --model "$SHARED_DIR/model" --artifact out.kvq.h5 --text "$SHARED_DIR/text.txt" \
    --windows 2 2>log >result
  events log >names
  grep -q progress names
  grep -q '"stage":"score"' log
}

@test "--progress json: errors are events, wherever the option stands" {
  needs_python
  for words in "--progress json --bits 9" "--bits 9 --progress=json" "--sampels 3 --progress json"; do
    run --separate-stderr calibrate $words -o out.kvq.h5
    show
    [ "$status" -eq 2 ]
    echo "$stderr" >log
    [ "$(events log)" = error ]
    [ "$(kvq_json_tool code <log)" = KVQ-E2001 ]
    [ "$(kvq_json_tool exit_code <log)" = 2 ]
    [ -n "$(kvq_json_tool next <log)" ]
  done
}

@test "--progress json: a file name that is not UTF-8 does not break a line" {
  needs_python
  run kvq-inspect --progress json $'bad\xff\xc3\n"name.h5'
  echo "$output" >log
  [ "$(events log)" = error ]
}

@test "--progress json --quiet leaves errors and warnings" {
  needs_python
  calibrate --progress json --quiet -o out.kvq.h5 2>log
  [ ! -s log ]
  kvq-inspect --progress json --quiet nowhere 2>log || true
  [ "$(events log)" = error ]
}

@test "in a log there is no bar, and a short run has no progress at all" {
  calibrate -o out.kvq.h5 2>log
  lacks $'\r' log
  lacks forward log
}

@test "a terminal gets a bar that fits into it, and --progress none takes it away" {
  script --version >/dev/null 2>&1 || skip "no script(1) to make a terminal with"
  words 6000 >long.txt # long enough for some redrawing
  cat >run.sh <<SH
stty cols \$1
exec kvq-calibrate --model "$SHARED_DIR/model" --text long.txt --samples 1000 --seq-len 32 --threads 1 --progress \$2 -f -o out.kvq.h5
SH
  for columns in 30 60 100; do
    TERM=xterm script -qec "bash run.sh $columns auto" /dev/null </dev/null >screen
    tr '\r' '\n' <screen | grep -aE '^(forward|loss|backward) .*%' >bars-$columns
    [ "$(wc -l <bars-$columns)" -ge 2 ]
    [ "$(awk '{ if (length($0) > most) most = length($0) } END { print most }' bars-$columns)" -lt $columns ]
  done
  # in the sweeps 60 columns have no room for a bar, nor for the memory, 100 have room for both; 30 cut the line
  tail -n 2 bars-*
  grep -E '%  layer [0-9]+/[0-9]+  .*  stage left ' bars-60
  lacks '^[a-z]+ward.*(\[|rss)' bars-60
  [ "$(grep -cE '^[a-z]+ \[#*\.*\] .*%.* layer [0-9]+/[0-9]+ .*stage left .* rss [0-9.]+ .iB *$' bars-100)" -ge 2 ]
  TERM=xterm script -qec "bash run.sh 100 none" /dev/null </dev/null >screen
  lacks 'stage left|\[#' screen
  TERM=dumb script -qec "bash run.sh 100 auto" /dev/null </dev/null >screen
  tr '\r' '\n' <screen >lines
  lacks '^(forward|loss|backward) |\[#' lines # a slow machine may print plain lines, which start with the program
}

# stop SIGNAL COMMAND...: runs it until the first event of a stage, sends the signal; its exit code is in $code, its
# stderr in the file log.
stop() {
  local signal=$1 pid i
  shift
  : >log # what an earlier run wrote there must not count
  "$@" 2>log &
  pid=$!
  for ((i = 0; i < 1500; i++)); do
    grep -q '"event":"progress"' log && break
    sleep 0.02
  done
  kill "-$signal" $pid
  code=0
  wait $pid || code=$?
}

@test "SIGTERM and SIGUSR1 end a run in order, and it says how to continue" {
  needs_python
  for signal in TERM USR1; do
    stop $signal kvq-calibrate --model "$SHARED_DIR/model" --text self --samples 32 --seq-len 256 --seed 7 --threads 1 \
      --progress json -o "my out.kvq.h5"
    cat log
    [ "$code" -eq 75 ]
    [ ! -e "my out.kvq.h5" ]
    events log >names
    [ "$(tail -n 2 names | xargs)" = "stopping stopped" ]
    event_line log stopped >stopped
    [ "$(kvq_json_tool code <stopped)" = KVQ-E7501 ]
    [ "$(kvq_json_tool exit_code <stopped)" = 75 ]
    eval "$(kvq_json_tool command <stopped)"
    kvq-inspect --check "my out.kvq.h5"
    mv "my out.kvq.h5" $signal.kvq.h5
  done
  cmp TERM.kvq.h5 USR1.kvq.h5
}
