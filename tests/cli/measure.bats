# SPDX-License-Identifier: Apache-2.0
# kvq-calibrate --measure-only and --from, the options of the fit, and the report on held-out windows.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 900 >"$SHARED_DIR/text.txt"
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL --measure-only \
    --outliers 0,2%,10% -o "$SHARED_DIR/m.kvqm.h5"
}

calibrate() { kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL "$@"; }
refit() { kvq-calibrate --from "$SHARED_DIR/m.kvqm.h5" "$@"; }

# The layers of an artifact, without where it comes from.
numbers() {
  kvq-export -q "$1" --to json -f -o numbers.json >/dev/null
  awk '/^\t"/ { inside = /"layers"/ } inside' numbers.json
}

@test "a measurement is one file, says what it holds, and suggests a fit" {
  succeeds calibrate --measure-only -o a.kvqm.h5
  [ "$(ls -A)" = a.kvqm.h5 ]
  contains "$output" "wrote a.kvqm.h5  sha256 "
  contains "$stderr" "measures   outliers 0%, 0.25%, 1%  weightings none, fisher, fisher-scaled, range" \
    "second moments of Q, K and V" "next: kvq-calibrate --from a.kvqm.h5 --bits 3 -o OUT.kvq.h5"
  succeeds calibrate --measure-only --threads 2 -o b.kvqm.h5
  cmp a.kvqm.h5 b.kvqm.h5
}

@test "a fit from a measurement finds the numbers of a calibration" {
  while read -r options; do
    # shellcheck disable=SC2086 # a list of options
    refit $options -f -o from.kvq.h5
    # shellcheck disable=SC2086
    calibrate $options -f -o direct.kvq.h5
    numbers from.kvq.h5 >from.json
    numbers direct.kvq.h5 >direct.json
    [ "$(wc -c <direct.json)" -gt 2000 ]
    cmp from.json direct.json
  done <<'EOF'
--k-bits 2 --v-bits 3 --outliers 2%
--bits 4 --outliers 0 --weighting none --groups head
--bits 5 --outliers 10% --weighting fisher --q-norm
--bits 3 --outliers 0 --k-datatype nf --v-datatype int-clamped --recent-window 5
--bits 8 --outliers 2% --weighting range --compare-lloyd
EOF
}

@test "the artifact of a fit says where it comes from" {
  refit --bits 2 --outliers 2% -o out.kvq.h5
  run kvq-inspect -q --json out.kvq.h5
  [ "$(json dataset source)" = text.txt ]
  [ "$(json quantizer outlier_fraction)" = 0.02 ]
  json provenance options_json >options.json
  [ "$(kvq_json_tool measurement <options.json)" = m.kvqm.h5 ]
  [ "$(kvq_json_tool k_bits <options.json)" = 2 ]
  [ "$(kvq_json_tool measurement_sha256 <options.json | wc -c)" -eq 65 ]
  succeeds kvq-validate --model "$SHARED_DIR/model" --artifact out.kvq.h5 --text "$SHARED_DIR/text.txt" --seq-len 32
}

@test "what was not measured is named, with what was" {
  fails 2 refit --outliers 1% -o out.kvq.h5
  contains "$stderr" "--outliers 1% was not measured; the file has 0%, 2%, 10%" "--measure-only --outliers LIST"
  fails 2 refit --outliers 2% --bits 7 -o out.kvq.h5
  contains "$stderr" "supported widths are 2, 3, 4, 5 and 8 bits"
}

@test "options that could have no effect are refused" {
  for option in "--sink-tokens 2" "--count-sinks" "--k-axis token" "--compat kvquant" "--samples 5" "--shard 0/2" \
    "--measure-only" "--model x" "--text x" "--capture x" "--eigenvectors"; do
    # shellcheck disable=SC2086
    fails 2 refit --outliers 2% $option -o out.kvq.h5
    contains "$stderr" "--from: ${option%% *} has no meaning here"
  done
  for option in "--bits 3" "--weighting none" "--q-norm" "--groups head" "--recent-window 3" "--held-out 1"; do
    # shellcheck disable=SC2086
    fails 2 calibrate --measure-only $option -o out.kvqm.h5
    contains "$stderr" "--measure-only: ${option%% *} has no meaning here"
  done
  fails 2 calibrate --outliers 0,1% -o out.kvq.h5
  contains "$stderr" "a fit has one"
  fails 2 calibrate --outliers 1%,0 --measure-only -o out.kvqm.h5
  contains "$stderr" "ascending"
  fails 2 calibrate --eigenvectors -o out.kvq.h5
  fails 2 calibrate --outliers 0,x --measure-only -o out.kvqm.h5
  fails 3 calibrate --measure-only --shard 0/2 --work-dir w -o out.kvqm.h5
  contains "$stderr" "mpirun"
}

@test "a measurement is not taken for an artifact, nor the other way round" {
  fails 3 kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/m.kvqm.h5" --text "$SHARED_DIR/text.txt"
  calibrate -o out.kvq.h5
  fails 3 kvq-calibrate --from out.kvq.h5 -o other.kvq.h5
  head -c 4000 "$SHARED_DIR/m.kvqm.h5" >cut.kvqm.h5
  fails 4 kvq-calibrate --from cut.kvqm.h5 -o other.kvq.h5
}

@test "held-out windows report the attention's error, and change no number of the fit" {
  calibrate -o plain.kvq.h5
  succeeds calibrate --held-out 2 -o reported.kvq.h5
  run kvq-inspect -q --json plain.kvq.h5
  [[ $output != *heldout* ]]
  run kvq-inspect -q --json reported.kvq.h5
  [ "$(json layers 0 k heldout tokens)" = 62 ] # two windows of 32 tokens, without their sinks
  for value in "$(json layers 0 attention_error)" "$(json layers 1 v heldout attention_error)"; do
    awk -v x="$value" 'BEGIN { exit !(x > 0 && x < 1) }'
  done
  refit --outliers 2% --held-out 2 --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" -o from.kvq.h5
  run kvq-inspect -q --json from.kvq.h5
  [ "$(json layers 1 k heldout tokens)" = 62 ]
  fails 2 refit --held-out 2 -o none.kvq.h5
  contains "$stderr" "--held-out needs --model and --text"
  calibrate --measure-only --seed 3 -o other.kvqm.h5 --bos always
  fails 3 kvq-calibrate --from other.kvqm.h5 --held-out 2 --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" \
    -o none.kvq.h5
  contains "$stderr" "took other windows of this text"
  fails 2 calibrate --held-out 2 --shard 0/2 --work-dir w -o none.kvqp
  for option in "--draw python" "--compat kvquant" "--documents kept"; do
    # shellcheck disable=SC2086
    fails 2 calibrate --held-out 2 $option -o none.kvq.h5
    contains "$stderr" "--held-out: with $option there are no windows"
  done
  fails 6 calibrate --held-out 2 --memory-limit 81MiB -o none.kvq.h5
}

@test "--compat kvquant imitates the public code, and says so" {
  succeeds calibrate --compat kvquant -o out.kvq.h5
  contains "$stderr" "weighting fisher" "sink tokens 0" "over sinks too" "V ranges by percentiles"
  run kvq-inspect -q --json out.kvq.h5
  json provenance options_json >options.json
  [ "$(kvq_json_tool draw <options.json)" = python ]
  [ "$(kvq_json_tool compat <options.json)" = kvquant ]
  [ "$(kvq_json_tool k_outlier_slots <options.json)" = -1 ]
  calibrate --draw python -o drawn.kvq.h5
}

@test "a stopped measurement goes on, and the plan writes nothing" {
  succeeds calibrate --measure-only --dry-run -o a.kvqm.h5
  [ -z "$(ls -A)" ]
  contains "$stderr" "would write a.kvqm.h5"
  succeeds refit --outliers 2% --dry-run -o a.kvq.h5
  [ -z "$(ls -A)" ]
  calibrate --measure-only -o a.kvqm.h5
  fails 2 calibrate --measure-only -o a.kvqm.h5
}
