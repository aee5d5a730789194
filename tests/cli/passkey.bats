# SPDX-License-Identifier: Apache-2.0
# kvq-validate --passkey on a small random model, which retrieves nothing: options, tables, errors. And the table of
# memory, which any artifact has.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o "$SHARED_DIR/a.kvq.h5"
}

validate() { kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" --threads 1 "$@"; }

@test "a table of lengths and depths, and what the cache keeps of nothing" {
  succeeds validate --passkey 400,512
  contains "$output" "keys retrieved of 3" "tokens  depth" "0%" "25%" "100%" "all              0 / 0 of 30" \
    "the baseline retrieves none"
  [ "$(grep -c '^ *\(400\|512\)  *\(  0 /   0 *\)\{5\}$' <<<"$output")" -eq 2 ]
  contains "$stderr" "passkey    2 lengths  5 depths  3 windows of each  BOS not added" "seed       0" "next: kvq-export"
}

@test "the JSON counts every cell" {
  succeeds validate --passkey 400,512 --depths 0.25,90% --passkey-trials 2 --seed 18446744073709551615 --bos always --json
  [ "$(json schema)" = kvq.validate/1 ]
  [ "$(json protocol)" = decode ]
  [ "$(json passkey seed)" = 18446744073709551615 ]
  [ "$(json passkey bos)" = always ]
  [ "$(json passkey bos_added)" = true ]
  [ "$(json passkey lengths)" = 2 ]
  [ "$(json passkey lengths 1 tokens)" = 512 ]
  [[ $(json passkey lengths 1 token_ids_sha256) =~ ^[0-9a-f]{64}$ ]]
  [ "$(json passkey lengths 1 depths)" = 2 ]
  [ "$(json passkey lengths 1 depths 0 depth)" = 0.25 ]
  [ "$(json passkey lengths 1 depths 1 trials)" = 2 ]
  [ "$(json passkey lengths 1 depths 1 baseline)" = 0 ]
  [ "$(json passkey lengths 1 depths 1 quantized)" = 0 ]
  [ "$(json passkey lengths 1 depths 1 both)" = 0 ]
  [ "$(json passkey all trials)" = 8 ]
  [ "$(json passkey kept mean)" = null ]
  [ "$(json gates)" = 0 ]
  run ! kvq_json_tool text <<<"$output"
  run ! kvq_json_tool kld <<<"$output"
}

@test "the seed decides the windows, threads decide nothing" {
  validate -q --passkey 400 --json >one.json
  validate -q --passkey 400 --json --threads 2 >two.json
  cmp one.json two.json
  validate -q --passkey 400 --json --seed 1 >seed.json
  hash() { kvq_json_tool passkey lengths 0 token_ids_sha256 <"$1"; }
  [ "$(hash one.json)" != "$(hash seed.json)" ]
}

@test "a gate on what is kept fails when the baseline retrieves none" {
  run --separate-stderr validate --passkey 400 --depths 0.5 --gate 'passkey>=90%' --json
  show
  [ "$status" -eq 1 ]
  [ "$(json gates 0 metric)" = passkey ]
  [ "$(json gates 0 verdict)" = fail ]
  [ "$(json gates 0 value)" = null ]
}

@test "lengths that cannot be are refused before any work" {
  fails 2 validate --passkey 1k
  contains "$stderr" "--passkey 1024: the model has 512 positions" "choose shorter windows"
  [[ $stderr != *"model "*"layers"* ]]
  fails 2 validate --passkey 400,60
  contains "$stderr" "windows of 60 tokens" "the shortest that have filler have"
  for list in k 1m 400, ,400 400,,500 -400 0 99999999999999999999 16385k "400 500" 0.5k; do
    fails 2 validate --passkey "$list"
    contains "$stderr" "--passkey: '$list' is not a list"
  done
  fails 2 validate --passkey "$(seq -s, 400 416)"
  contains "$stderr" "up to 16 lengths"
}

@test "pass keys and texts do not mix" {
  for other in "--text $SHARED_DIR/text.txt" "--seq-len 32" "--windows 3" "--newlines bare"; do
    fails 2 validate --passkey 400 $other
    contains "$stderr" "--passkey 400: it makes its own windows"
  done
  fails 2 validate --passkey 400 --protocol decode --prompt 30
  contains "$stderr" "makes its own windows"
  fails 2 kvq-validate --model "$SHARED_DIR/model" --passkey 400
  contains "$stderr" "--passkey: there is no cache" "add --artifact"
  fails 2 validate --passkey 400 --gate 'dppl<=1%'
  contains "$stderr" "--passkey does not measure it"
  fails 2 validate --text "$SHARED_DIR/text.txt" --gate 'passkey>=90%'
  contains "$stderr" "a text has no pass keys" "--passkey 1k,2k"
  fails 2 validate --text "$SHARED_DIR/text.txt" --depths 50%
  contains "$stderr" "--depths: belongs to --passkey"
  fails 2 validate --text "$SHARED_DIR/text.txt" --passkey-trials 3
  contains "$stderr" "--passkey-trials: belongs to --passkey"
  fails 2 validate --passkey 400 --depths 101%
}

# Two layers, two KV heads of 16: 256 bytes of f16 a token; 3 bits and an outlier slot per side and tensor of 32.
@test "validate and inspect tell what long contexts need" {
  succeeds kvq-inspect "$SHARED_DIR/a.kvq.h5"
  contains "$output" "memory of one sequence" "compression"
  [ "$(grep -c '^ *\(32K\|128K\|1M\|10M\) ' <<<"$output")" -eq 4 ]
  succeeds kvq-inspect "$SHARED_DIR/a.kvq.h5" --json
  [ "$(json memory)" = 4 ]
  [ "$(json memory 0 length)" = 32K ]
  [ "$(json memory 1 tokens)" = 131072 ]
  [ "$(json memory 3 tokens)" = 10000000 ]
  [ "$(json memory 1 fp16_bytes)" = $((131072 * 256)) ]
  for key in bytes bytes_per_token compression formula_bytes formula_compression; do
    [[ $(json memory 1 $key) =~ ^[0-9]+ ]]
  done
  bytes=$(json memory 1 bytes)
  succeeds validate --text "$SHARED_DIR/text.txt" --windows 2 --json
  [ "$(json memory 1 bytes)" = "$bytes" ]
  succeeds validate --text "$SHARED_DIR/text.txt" --windows 2
  contains "$output" "memory of one sequence"
  succeeds validate --passkey 400 --depths 0 --json
  [ "$(json memory)" = 4 ]
}

@test "what a test of pass keys does not measure is refused" {
  fails 2 validate --passkey 400 --protocol prefill
  contains "$stderr" "--passkey" "always decoded"
  fails 2 validate --passkey 400 --noise-windows 0
  fails 2 validate --passkey 400 --html out.html
  succeeds validate --passkey 400 --depths 0.5 --protocol decode
}
