# SPDX-License-Identifier: Apache-2.0
# What every program answers before it does anything.
load common

@test "--help goes to stdout, exits 0, and fits the documented command line" {
  for program in $PROGRAMS; do
    succeeds "$program" --help
    contains "$output" "usage: $program " "examples:" "--quiet" "--version"
    [ -z "$stderr" ]
    succeeds "$program" -h
  done
}

@test "--version prints name and version on stdout" {
  for program in $PROGRAMS kvq; do
    succeeds "$program" --version
    [[ $output =~ ^$program\ [0-9]+\.[0-9]+\.[0-9]+$ ]]
    succeeds "$program" -V
  done
}

@test "help names every option of the agreed command lines" {
  succeeds kvq-calibrate --help
  contains "$output" --model --text --samples --seq-len --seed --bits --k-bits --v-bits --outliers --sink-tokens \
    --threads --force --output -o, --tokens --weighting --bos --work-dir --dry-run --progress
  succeeds kvq-export --help
  contains "$output" --to --model --output --check --list-targets --json --force
  succeeds kvq-validate --help
  contains "$output" --model --artifact --text --tokens --seq-len --windows --bos --gate --json --seed \
    --allow-other-weights
  succeeds kvq-inspect --help
  contains "$output" --check --json
}

@test "rare options are shown on demand" {
  succeeds kvq-calibrate --help
  contains "$output" "--help-all"
  [[ $output != *--k-axis* ]]
  succeeds kvq-calibrate --help-all
  contains "$output" --k-axis --k-domain --groups --datatype --q-norm --compat --shard --held-out --from --measure-only
  [ "$(wc -L <<<"$output")" -le 120 ]
  succeeds kvq-inspect --help
  [[ $output != *--help-all* ]]
}

@test "help fits on a screen" {
  for program in $PROGRAMS; do
    succeeds "$program" --help
    [ "$(wc -l <<<"$output")" -le 50 ]
    [ "$(wc -L <<<"$output")" -le 120 ]
  done
}

@test "an unknown option exits 2 and the closest one is suggested" {
  fails 2 kvq-calibrate --sampels 4
  contains "$stderr" "unknown option --sampels" "did you mean --samples?"
  fails 2 kvq-validate --artefact a.kvq.h5
  contains "$stderr" "unknown option --artefact" "did you mean --artifact?"
  fails 2 kvq-export --list-target
  contains "$stderr" "did you mean --list-targets?"
  fails 2 kvq-inspect --jsno
  contains "$stderr" "did you mean --json?"
}

@test "missing arguments are named" {
  fails 2 kvq-calibrate --text a -o b
  contains "$stderr" "--model is missing"
  fails 2 kvq-calibrate --model m --text a
  contains "$stderr" "--output (-o) is missing"
  fails 2 kvq-calibrate --model m -o b
  contains "$stderr" "--text is missing"
  fails 2 kvq-validate --text a
  contains "$stderr" "--model is missing"
  fails 2 kvq-validate --model m
  contains "$stderr" "--text is missing"
  fails 2 kvq-export
  contains "$stderr" "the artifact is missing"
  fails 2 kvq-export a.kvq.h5 -o b
  contains "$stderr" "--to is missing" "--list-targets"
  fails 2 kvq-export a.kvq.h5 --to json
  contains "$stderr" "--output (-o) is missing"
  fails 2 kvq-inspect
  contains "$stderr" "the artifact is missing"
  fails 2 kvq-calibrate --model
  contains "$stderr" "--model: the value is missing"
}

@test "numbers are read to their end and must lie in range" {
  fails 2 kvq-calibrate --model m --text a -o b --bits 9
  contains "$stderr" "--bits: 9 is not between 2 and 8"
  fails 2 kvq-calibrate --model m --text a -o b --samples 4x
  contains "$stderr" "--samples: '4x' is not a whole number"
  fails 2 kvq-calibrate --model m --text a -o b --seed -1
  contains "$stderr" "--seed: '-1'"
  fails 2 kvq-calibrate --model m --text a -o b --outliers 11%
  contains "$stderr" "--outliers: 11% is not between 0% and 10%"
  fails 2 kvq-calibrate --model m --text a -o b --threads 0
  contains "$stderr" "--threads: 0 is not between 1 and"
  fails 2 kvq-validate --model m --text a --bos maybe
  contains "$stderr" "--bos: 'maybe' is none of auto, always, never"
}

@test "contradictions are refused" {
  fails 2 kvq-calibrate --model m --text a -o b --bits 3 --k-bits 2
  contains "$stderr" "--bits 3 and --k-bits or --v-bits contradict each other"
  fails 2 kvq-calibrate --model m --text a --tokens b.npy -o c
  contains "$stderr" "--text a and --tokens b.npy contradict each other"
  fails 2 kvq-calibrate --model m --text self --bos never -o c
  contains "$stderr" "--bos never"
  fails 2 kvq-validate --model m --text a --seed 3
  contains "$stderr" "--seed: only text that the model writes"
  fails 2 kvq-export a.kvq.h5 --to json -o b --json
  contains "$stderr" "--json: belongs to --list-targets"
  fails 2 kvq-inspect a.kvq.h5 b.kvq.h5
  contains "$stderr" "unexpected argument 'b.kvq.h5'"
}

@test "gates are checked before anything is opened" {
  fails 2 kvq-validate --model m --artifact a --text t --gate 'speed>=3'
  contains "$stderr" "--gate 'speed>=3'" "unknown metric"
  fails 2 kvq-validate --model m --artifact a --text t --gate 'dppl=1%'
  contains "$stderr" "--gate 'dppl=1%'"
  fails 2 kvq-validate --model m --text t --gate 'dppl<=1%'
  contains "$stderr" "dppl is only measured with an artifact" "add --artifact"
}

@test "an unknown export target is refused and the closest one suggested" {
  fails 2 kvq-export a.kvq.h5 --to safetensor -o b
  contains "$stderr" "--to safetensor: there is no such target" "did you mean safetensors?"
}

@test "--list-targets prints a table, or one JSON document" {
  succeeds kvq-export --list-targets
  contains "$output" safetensors json
  succeeds kvq-export --list-targets --json
  [ "$(json schema)" = kvq.targets/1 ]
  [ "$(json targets)" -ge 2 ]
  for key in name files consumer carries; do [ -n "$(json targets 0 $key)" ]; done
}

@test "a missing input file is named with exit code 3" {
  fails 3 kvq-inspect nowhere.kvq.h5
  contains "$stderr" nowhere.kvq.h5
  fails 3 kvq-calibrate --model nowhere --text missing.txt -o out.kvq.h5
  contains "$stderr" missing.txt
  words 10 >text.txt
  fails 3 kvq-calibrate --model nowhere --text text.txt -o out.kvq.h5
  contains "$stderr" nowhere
  fails 3 kvq-validate --model nowhere --text text.txt
  contains "$stderr" nowhere
}

@test "the dispatcher runs the program of the same name and passes its exit code on" {
  succeeds kvq --help
  contains "$output" calibrate export validate inspect
  succeeds kvq inspect --version
  [[ $output == kvq-inspect\ * ]]
  fails 2 kvq calibrate --sampels 3
  contains "$stderr" "kvq-calibrate: error" "did you mean --samples?"
  fails 2 kvq calibarte
  contains "$stderr" "unknown command 'calibarte'" "did you mean kvq calibrate?"
  run --separate-stderr kvq
  [ "$status" -eq 2 ]
}

@test "a result that cannot be written to stdout is an error" {
  [ -e /dev/full ] || skip "no /dev/full"
  run --separate-stderr sh -c 'kvq-export --list-targets >/dev/full'
  show
  [ "$status" -eq 6 ]
  contains "$stderr" "standard output"
}

@test "docs/exit-codes.md lists every status with its number and exit code" {
  list=$(sed -n 's/^ *X(ERR_[A-Z_]*, \([0-9]*\), \([0-9]*\), "\([^"]*\)",.*/| KVQ-E\1 | \3 | \2 |/p' "$SOURCE/core/kvq_core.h")
  [ "$(wc -l <<<"$list")" -ge 12 ]
  while read -r row; do
    grep -qF "$row" "$SOURCE/docs/exit-codes.md" || {
      echo "docs/exit-codes.md lacks: $row"
      return 1
    }
  done <<<"$list"
}
