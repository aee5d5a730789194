# SPDX-License-Identifier: Apache-2.0
# The way of a model through all programs, on a tiny random checkpoint.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  words 60 5000 >"$SHARED_DIR/held.txt"
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o "$SHARED_DIR/a.kvq.h5"
}

calibrate() { kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL "$@"; }
validate() { kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" --threads 1 "$@"; }

@test "calibrate writes one file, says what it did, and suggests validation" {
  succeeds calibrate -o out.kvq.h5
  [ "$(ls -A)" = out.kvq.h5 ]
  contains "$output" "wrote out.kvq.h5" "content sha256 "
  [ "$(wc -l <<<"$output")" -eq 1 ]
  contains "$stderr" "model " "quantizer " "3 bits" "outliers 1%" "worst layers" "bits per element" \
    "next: kvq-validate --model $SHARED_DIR/model --artifact out.kvq.h5"
}

@test "the same command gives the same bytes, on one thread or two" {
  calibrate -o again.kvq.h5
  cmp again.kvq.h5 "$SHARED_DIR/a.kvq.h5"
  calibrate --threads 2 -o two.kvq.h5
  cmp two.kvq.h5 "$SHARED_DIR/a.kvq.h5"
}

@test "another seed, text, width or weighting gives other content" {
  succeeds calibrate --seed 1 -o seed.kvq.h5
  succeeds calibrate --bits 2 -o bits.kvq.h5
  succeeds calibrate --weighting none -o weighting.kvq.h5
  succeeds calibrate --sink-tokens 0 -o sinks.kvq.h5
  contains "$stderr" "warning: --sink-tokens 0: keys of the first token"
  cp "$SHARED_DIR/a.kvq.h5" .
  for file in *.kvq.h5; do kvq-inspect --check "$file"; done >hashes
  [ "$(sort -u hashes | wc -l)" -eq 5 ]
}

@test "the seed decides which windows of the text are used" {
  calibrate --seed 1 -o one.kvq.h5
  ids() { kvq-inspect -q --json "$1" | kvq_json_tool dataset token_ids_sha256; }
  [ "$(ids one.kvq.h5)" != "$(ids "$SHARED_DIR/a.kvq.h5")" ]
}

@test "an existing output is kept unless --force is given, and that is found out first" {
  echo precious >out.kvq.h5
  fails 2 calibrate -o out.kvq.h5
  contains "$stderr" "KVQ-E2002" "out.kvq.h5" "already exists" "--force"
  [ "$(cat out.kvq.h5)" = precious ]
  [[ $stderr != *"model "* ]]
  succeeds calibrate --force -o out.kvq.h5
  cmp out.kvq.h5 "$SHARED_DIR/a.kvq.h5"
}

@test "a dry run prints the plan and writes nothing" {
  succeeds calibrate --dry-run -o out.kvq.h5
  contains "$stderr" "memory " "disk " "TFLOP" "time  " "nothing was written"
  [ -z "$output" ]
  [ -z "$(ls -A)" ]
}

@test "widths and options are recorded as they took effect" {
  calibrate --k-bits 2 --v-bits 4 --outliers 0 --sink-tokens 2 --seed 18446744073709551615 --bos never -o out.kvq.h5
  succeeds kvq-inspect out.kvq.h5 --json
  [ "$(json layers 0 k bits)" = 2 ]
  [ "$(json layers 0 k codebook)" = 4 ]
  [ "$(json layers 0 v bits)" = 4 ]
  [ "$(json layers 0 v codebook)" = 16 ]
  [ "$(json layers 0 v lower)" = null ]
  [ "$(json quantizer sink_tokens)" = 2 ]
  [ "$(json quantizer n_side_k)" = 0 ]
  [ "$(json dataset seed)" = 18446744073709551615 ]
  [ "$(json dataset samples)" = 4 ]
  [ "$(json dataset seq_len)" = 32 ]
  json provenance options_json >options.json
  [ "$(kvq_json_tool v_bits <options.json)" = 4 ]
  [ "$(kvq_json_tool weighting <options.json)" = fisher-scaled ]
  [ "$(kvq_json_tool bos <options.json)" = never ]
}

@test "an artifact names its sources by name and hash and holds no path" {
  succeeds kvq-inspect "$SHARED_DIR/a.kvq.h5" --json
  [ "$(json dataset source)" = text.txt ]
  [ "$(json dataset sha256)" = "$(sha256sum <"$SHARED_DIR/text.txt" | cut -d' ' -f1)" ]
  [ "$(json model name)" = model ]
  [ "$(json model config_sha256)" = "$(sha256sum <"$SHARED_DIR/model/config.json" | cut -d' ' -f1)" ]
  [ "$(json tokenizer sha256)" = "$(sha256sum <"$SHARED_DIR/model/tokenizer.json" | cut -d' ' -f1)" ]
  run grep -qaF "$SHARED_DIR" "$SHARED_DIR/a.kvq.h5"
  [ "$status" -eq 1 ]
}

@test "inspect shows a table, --check prints the content hash that calibrate printed" {
  succeeds calibrate -o out.kvq.h5
  sha256=$(grep -o '[0-9a-f]\{64\}' <<<"$output")
  succeeds kvq-inspect out.kvq.h5 --check
  [ "$output" = "ok  content sha256 $sha256" ]
  succeeds kvq-inspect out.kvq.h5
  contains "$output" "$sha256" "model " "tokenizer " "dataset " "quantizer " "bits per element at 32 tokens" "weighted error"
  [ "$(grep -c '^ *[0-9]*  [KV] ' <<<"$output")" -eq "$(($(kvq-inspect -q out.kvq.h5 --json | kvq_json_tool layers) * 2))" ]
  contains "$stderr" "next: kvq-validate"
}

@test "every export target is exact and belongs to its model" {
  for target in json safetensors; do
    succeeds kvq-export "$SHARED_DIR/a.kvq.h5" --to $target --model "$SHARED_DIR/model" -o out.$target --check
    contains "$output" "wrote out.$target" "largest error 0"
    contains "$stderr" "next: "
    fails 2 kvq-export "$SHARED_DIR/a.kvq.h5" --to $target -o out.$target
    contains "$stderr" "already exists"
    succeeds kvq-export "$SHARED_DIR/a.kvq.h5" --to $target -o out.$target --force
  done
  kvq_json_tool <out.json
}

@test "validate measures, and its JSON is one document with the promised keys" {
  succeeds validate --text "$SHARED_DIR/held.txt" --json
  [ "$(json schema)" = kvq.validate/1 ]
  [ "$(json seq_len)" = 32 ]
  windows=$(json windows)
  [ "$windows" -ge 2 ]
  [ "$(json tokens_scored)" -eq $((windows * 31)) ]
  [ "$(json baseline window_nll)" -eq "$windows" ]
  [ "$(json quantized window_nll)" -eq "$windows" ]
  for path in "baseline ppl" "quantized ppl" "dppl mean" "dppl stderr" "kld mean" top1 effective_bits; do
    [[ $(json $path) =~ ^-?[0-9] ]]
  done
  [ "$(json gates)" = 0 ]
  [ "$(json text source)" = held.txt ]
  [ "$(json text sha256)" = "$(sha256sum <"$SHARED_DIR/held.txt" | cut -d' ' -f1)" ]
  [ "$(json artifact content_sha256)" = "$(kvq-inspect -q --check "$SHARED_DIR/a.kvq.h5" | cut -d' ' -f5)" ]
  [ "$(json model weights_sha256)" = "$(kvq-inspect -q --json "$SHARED_DIR/a.kvq.h5" | kvq_json_tool model weights_sha256)" ]
}

@test "gates decide the exit code: 0 when all hold, 1 when one fails" {
  succeeds validate --text "$SHARED_DIR/held.txt" --gate 'top1>=0' --gate 'effective_bits<=16'
  contains "$output" "PPL" "KLD" "top-1" "PASS  top1>=0" "result: PASS (0 of 2 gates failed"
  contains "$stderr" "next: kvq-export"
  run --separate-stderr validate --text "$SHARED_DIR/held.txt" --gate 'top1>=0' --gate 'kld.mean<=0' --json
  show
  [ "$status" -eq 1 ]
  [ "$(json gates)" = 2 ]
  [ "$(json gates 0 verdict)" = pass ]
  [ "$(json gates 1 expression)" = 'kld.mean<=0' ]
  [ "$(json gates 1 metric)" = kld.mean ]
  [ "$(json gates 1 verdict)" = fail ]
  [ "$(json gates 1 limit)" = 0 ]
  [ "$(json gates 1 value)" = "$(json kld mean)" ]
  [[ $stderr != *"error KVQ"* ]]
}

@test "more bits lose less" {
  for bits in 2 4; do
    calibrate --bits $bits -o $bits.kvq.h5
    kvq-validate -q --model "$SHARED_DIR/model" --artifact $bits.kvq.h5 --text "$SHARED_DIR/held.txt" --json >$bits.json
  done
  # scaled to integers, because the shell compares nothing else
  two=$(printf %.0f "$(kvq_json_tool kld mean <2.json)e9")
  four=$(printf %.0f "$(kvq_json_tool kld mean <4.json)e9")
  [ "$four" -lt "$two" ]
}

@test "a single window has no spread, and the report says so" {
  succeeds validate --text "$SHARED_DIR/held.txt" --windows 1
  contains "$output" "1 windows" "one window has no spread"
  succeeds validate --text "$SHARED_DIR/held.txt" --windows 1 --json
  [ "$(json dppl stderr)" = null ]
}

@test "validate gives the same report on one thread or two" {
  validate -q --text "$SHARED_DIR/held.txt" --json >one.json
  validate -q --text "$SHARED_DIR/held.txt" --json --threads 2 >two.json
  cmp one.json two.json
}

@test "without an artifact only the baseline is measured" {
  succeeds kvq-validate --model "$SHARED_DIR/model" --text "$SHARED_DIR/held.txt" --seq-len 32 --windows 2 --gate 'ppl<=1e9' --json
  [ "$(json windows)" = 2 ]
  [[ $(json baseline ppl) =~ ^[0-9] ]]
  run ! kvq_json_tool quantized <<<"$output"
  run ! kvq_json_tool dppl <<<"$output"
}

@test "token ids bypass the tokenizer" {
  npy_ids ids.npy $(for i in {1..200}; do echo $((i * i % 61)); done)
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --tokens ids.npy $SMALL -o out.kvq.h5
  succeeds kvq-inspect out.kvq.h5 --json
  [ "$(json tokenizer kind)" = none ]
  [ "$(json dataset source)" = ids.npy ]
  [ "$(json dataset available_tokens)" = 200 ]
  succeeds kvq-validate --model "$SHARED_DIR/model" --artifact out.kvq.h5 --tokens ids.npy --json
  [ "$(json text tokenizer)" = none ]
  [ "$(json windows)" = 6 ]
}

@test "a BOS token is added when asked for, and recorded" {
  calibrate --bos always -o with.kvq.h5
  calibrate --bos never -o without.kvq.h5
  [ "$(kvq-inspect -q --json with.kvq.h5 | kvq_json_tool tokenizer bos_added)" = true ]
  [ "$(kvq-inspect -q --json without.kvq.h5 | kvq_json_tool tokenizer bos_added)" = false ]
}

@test "text that the model writes itself: calibrated, validated on another seed, reproducible" {
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text self $SMALL --seed 7 -o self.kvq.h5
  contains "$stderr" "--text self"
  kvq-calibrate -q --model "$SHARED_DIR/model" --text self $SMALL --seed 7 --threads 2 -o again.kvq.h5
  cmp self.kvq.h5 again.kvq.h5
  succeeds kvq-inspect self.kvq.h5 --json
  [ "$(json dataset source)" = self ]
  [ "$(json dataset sha256)" = "" ]
  succeeds kvq-validate --model "$SHARED_DIR/model" --artifact self.kvq.h5 --text self --json
  [ "$(json text source)" = self ]
  [ "$(json text seed)" = 8 ]
  [ "$(json windows)" = 4 ]
  fails 2 kvq-validate --model "$SHARED_DIR/model" --artifact self.kvq.h5 --text self --seed 7
  contains "$stderr" "--seed 7" "calibrated on the text of this seed"
}

@test "a GGUF goes the same way" {
  kvq_make_model_tool gguf-source --gguf model.gguf
  succeeds kvq-calibrate --model model.gguf --text "$SHARED_DIR/text.txt" $SMALL -o out.kvq.h5
  succeeds kvq-validate --model model.gguf --artifact out.kvq.h5 --text "$SHARED_DIR/held.txt" --gate 'top1>=0'
  [ "$(kvq-inspect -q --json out.kvq.h5 | kvq_json_tool model name)" = model.gguf ]
}

@test "-q leaves stderr empty, --progress plain never writes a carriage return" {
  succeeds calibrate -q -o quiet.kvq.h5
  [ -z "$stderr" ]
  contains "$output" "wrote quiet.kvq.h5"
  succeeds calibrate --progress plain -o plain.kvq.h5
  [[ $stderr != *$'\r'* ]]
  succeeds calibrate -o auto.kvq.h5
  [[ $stderr != *$'\r'* ]]
}

@test "an explicit work folder is used and removed; one that holds other files is kept with them" {
  mkdir mine
  echo precious >mine/file
  succeeds calibrate --work-dir mine -o out.kvq.h5
  [ "$(ls -A mine)" = file ]
  succeeds calibrate --work-dir scratch -o other.kvq.h5
  [ ! -e scratch ]
}
