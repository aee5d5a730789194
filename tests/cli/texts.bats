# SPDX-License-Identifier: Apache-2.0
# Sample sets: compressed texts, documents, several texts and their weights, the BOS token; and what is refused.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  words 100 7000 >"$SHARED_DIR/other.txt"
  # 12 documents of 1 to 12 lines
  for i in {1..12}; do
    printf '{"id": %d, "text": "%s"}\n' "$i" "$(words "$i" $((i * 100)) | sed 's/$/\\n/' | tr -d '\n')"
  done >"$SHARED_DIR/docs.jsonl"
}

MODEL() { echo "$SHARED_DIR/model"; }
calibrate() { kvq-calibrate -q --model "$(MODEL)" $SMALL -o out.kvq.h5 --force "$@"; }
# ids TEXT-OPTION...: hash of the token ids that a calibration with these options uses
ids() {
  calibrate "$@" >/dev/null && kvq-inspect -q --json out.kvq.h5 | kvq_json_tool dataset token_ids_sha256
}
recorded() { kvq-inspect -q --json out.kvq.h5 | kvq_json_tool provenance options_json | kvq_json_tool "$@"; }
dataset() { kvq-inspect -q --json out.kvq.h5 | kvq_json_tool dataset "$@"; }
# refused CODE OPTION...
refused() {
  local code=$1
  shift
  fails "$code" kvq-calibrate --model "$(MODEL)" $SMALL -o out.kvq.h5 "$@"
}

@test "a compressed text is the text; its hash is that of the file" {
  plain=$(ids --text "$SHARED_DIR/text.txt")
  for tool in gzip bzip2 xz zstd; do
    command -v $tool >/dev/null || continue
    $tool -c "$SHARED_DIR/text.txt" >packed.$tool # the name does not matter
    [ "$(ids --text packed.$tool)" = "$plain" ]
    [ "$(dataset sha256)" = "$(sha256sum <packed.$tool | cut -d' ' -f1)" ]
    [ "$(dataset source)" = packed.$tool ]
  done
}

@test "jsonl: one document per line, joined or kept, under any field, compressed or not" {
  joined=$(ids --text "$SHARED_DIR/docs.jsonl")
  [ "$(recorded documents)" = joined ]
  all=$(dataset available_tokens)
  kept=$(ids --text "$SHARED_DIR/docs.jsonl" --documents kept)
  [ "$(recorded documents)" = kept ]
  [ "$joined" != "$kept" ]
  raw=$(ids --text "$SHARED_DIR/docs.jsonl" --text-format raw)
  [ "$raw" != "$joined" ]
  gzip -c "$SHARED_DIR/docs.jsonl" >docs.jsonl.gz
  [ "$(ids --text docs.jsonl.gz)" = "$joined" ]
  sed 's/"text"/"body"/' "$SHARED_DIR/docs.jsonl" >docs.txt
  [ "$(ids --text docs.txt --text-format jsonl --text-field body)" = "$joined" ]
  [ "$(recorded text_field)" = body ]
  # joined documents have a token between them
  sed 's/^.*"text": "//; s/"}$//; s/\\n/\n/g' "$SHARED_DIR/docs.jsonl" | sed '/^$/d' >flat.txt
  [ "$(ids --text flat.txt)" != "$joined" ]
  [ "$all" -eq $(($(dataset available_tokens) + 11)) ]
}

@test "documents that are too short are left out and counted" {
  printf '{"text": "short"}\n%.0s' {1..5} >docs.jsonl
  cat "$SHARED_DIR/docs.jsonl" >>docs.jsonl
  succeeds kvq-calibrate --model "$(MODEL)" $SMALL --text docs.jsonl --documents kept -o out.kvq.h5
  contains "$stderr" "warning" "docs.jsonl: 5 of 17 documents are shorter than a window of 32 tokens and left out" \
    "docs.jsonl  17 documents"
  head -5 docs.jsonl >short.jsonl
  rm out.kvq.h5
  refused 3 --text short.jsonl --documents kept
  contains "$stderr" "short.jsonl: none of the 5 documents has the 32 tokens of one window"
}

@test "several texts: windows by tokens, or by weights, one text behind the other" {
  calibrate --samples 8 --text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt" >/dev/null
  [ "$(recorded text_windows)" = 2 ]
  [ "$(recorded text_windows 0)" = 6 ] # 300 and 100 lines
  [ "$(recorded text_windows 1)" = 2 ]
  [ "$(dataset source)" = "text.txt + other.txt" ]
  (cd "$SHARED_DIR" && sha256sum text.txt other.txt) >sums
  [ "$(dataset sha256)" = "$(sha256sum <sums | cut -d' ' -f1)" ]
  for mix in text.txt=0.25,other.txt=0.75 "other.txt=3,$SHARED_DIR/text.txt=1"; do
    calibrate --samples 8 --text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt" --mix "$mix" >/dev/null
    [ "$(recorded text_windows 0)" = 2 ]
    [ "$(recorded text_windows 1)" = 6 ]
    run grep -qaF "$SHARED_DIR" out.kvq.h5
    [ "$status" -eq 1 ]
    dataset token_ids_sha256 >>hashes
  done
  [ "$(sort -u hashes | wc -l)" -eq 1 ]
  calibrate --threads 2 --samples 8 --text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt" --mix "$mix" >/dev/null
  [ "$(dataset token_ids_sha256)" = "$(head -1 hashes)" ]
  # weight 0 leaves a text out, and says so
  succeeds kvq-calibrate --model "$(MODEL)" $SMALL --text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt" \
    --mix text.txt=0,other.txt=1 -o zero.kvq.h5
  contains "$stderr" "warning" "text.txt: none of the 4 windows comes from it"
}

# Lines that end in spaces, with blank lines between them, some of which are not empty.
ragged() { sed 's/$/  /; s/$/\n   \n/' "$SHARED_DIR/text.txt"; }

@test "--newlines: the tokens are those of the changed text, under a name that says so" {
  ragged >ragged.txt
  sed 's/ *$//' ragged.txt >bare.txt
  sed '/^$/d' bare.txt >single.txt
  kept=$(ids --text ragged.txt)
  [ "$(recorded newlines)" = kept ]
  [ "$(dataset source)" = ragged.txt ]
  [ "$(ids --text ragged.txt --newlines kept)" = "$kept" ]
  for how in bare single; do
    changed=$(ids --text ragged.txt --newlines $how)
    [ "$(recorded newlines)" = $how ]
    [ "$(dataset source)" = "ragged.txt ($how newlines)" ]
    [ "$(dataset sha256)" = "$(sha256sum <ragged.txt | cut -d' ' -f1)" ] # of the file as it is stored
    [ "$changed" != "$kept" ]
    [ "$(ids --text $how.txt)" = "$changed" ]
  done
  validate() { kvq-validate -q --model "$(MODEL)" --seq-len 32 --json "$@"; }
  validate --text ragged.txt --newlines single >changed.json
  validate --text single.txt >written.json
  validate --text ragged.txt >kept.json
  [ "$(kvq_json_tool text source <changed.json)" = "ragged.txt (single newlines)" ]
  for key in windows tokens_scored "text token_ids_sha256"; do
    # shellcheck disable=SC2086 # a path
    [ "$(kvq_json_tool $key <changed.json)" = "$(kvq_json_tool $key <written.json)" ]
  done
  [ "$(kvq_json_tool windows <changed.json)" -lt "$(kvq_json_tool windows <kept.json)" ]
  fails 2 kvq-calibrate --model "$(MODEL)" $SMALL --text ragged.txt --newlines windows -o other.kvq.h5
  contains "$stderr" "--newlines: 'windows' is none of kept, bare, single, mixed"
}

@test "--newlines mixed: every text twice, as it is and bare" {
  ragged >ragged.txt
  succeeds kvq-calibrate --model "$(MODEL)" --samples 8 --seq-len 32 --threads 1 --text ragged.txt --newlines mixed \
    -o mixed.kvq.h5
  contains "$stderr" "ragged.txt  1 documents" "ragged.txt (bare newlines)  1 documents"
  mv mixed.kvq.h5 out.kvq.h5
  [ "$(recorded newlines)" = mixed ]
  [ "$(dataset source)" = "ragged.txt + ragged.txt (bare newlines)" ]
  [ "$(recorded text_windows)" = 2 ]
  [ $(($(recorded text_windows 0) + $(recorded text_windows 1))) -eq 8 ]
  # by weights the two versions have equal shares, whatever their lengths
  calibrate --samples 8 --text ragged.txt --text "$SHARED_DIR/other.txt" --newlines mixed --mix ragged.txt=3,other.txt=1
  [ "$(recorded text_windows)" = 4 ]
  for i in 0 1; do [ "$(recorded text_windows $i)" = 3 ]; done
  for i in 2 3; do [ "$(recorded text_windows $i)" = 1 ]; done
  many=()
  for i in {1..17}; do many+=(--text "$SHARED_DIR/other.txt"); done
  rm out.kvq.h5
  refused 2 "${many[@]}" --newlines mixed
  contains "$stderr" "--newlines mixed: at most 16 texts, there are 17"
}

@test "a text of its own name or weight: what --mix refuses" {
  two=(--text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt")
  refused 2 "${two[@]}" --mix text.txt=1,another.txt=1
  contains "$stderr" "--mix: 'another.txt' names none of the texts"
  refused 2 "${two[@]}" --mix text.txt=1
  contains "$stderr" "--mix: no weight for other.txt"
  refused 2 "${two[@]}" --mix text.txt=-1,other.txt=1
  contains "$stderr" "--mix: 'text.txt=-1' has no weight of 0 or more"
  for weight in x 1x "" inf nan 0x1; do
    refused 2 "${two[@]}" --mix "other.txt=1,text.txt=$weight"
    contains "$stderr" "--mix: 'text.txt=$weight' has no weight"
  done
  refused 2 "${two[@]}" --mix text.txt=0,other.txt=0
  contains "$stderr" "--mix: the weights add up to 0"
  refused 2 "${two[@]}" --mix text.txt=1,other.txt=1,text.txt=2
  contains "$stderr" "--mix: text.txt is named twice"
  refused 2 "${two[@]}" --mix 1,2
  contains "$stderr" "--mix: '1' names none of the texts"
  refused 2 --text "$SHARED_DIR/text.txt" --mix text.txt=1
  contains "$stderr" "--mix: there is only one text"
  mkdir sub
  cp "$SHARED_DIR/other.txt" sub/text.txt
  refused 2 --text "$SHARED_DIR/text.txt" --text sub/text.txt --mix text.txt=1,sub/text.txt=1
  contains "$stderr" "--mix: 'text.txt' names several texts"
  succeeds kvq-calibrate --model "$(MODEL)" $SMALL --text "$SHARED_DIR/text.txt" --text sub/text.txt \
    --mix "$SHARED_DIR/text.txt=1,sub/text.txt=1" -o out.kvq.h5
}

@test "self goes alone" {
  refused 2 --text self --text "$SHARED_DIR/text.txt"
  contains "$stderr" "--text self" "cannot be mixed"
}

@test "damaged and foreign files" {
  gzip -c "$SHARED_DIR/text.txt" >text.gz
  truncate -s -9 text.gz
  refused 4 --text text.gz
  contains "$stderr" "text.gz: the compressed text breaks off"
  gzip -c "$SHARED_DIR/text.txt" >more.gz
  echo more >>more.gz
  refused 4 --text more.gz
  contains "$stderr" "more.gz: the compressed text ends at byte"
  printf 'PAR1....' >text.parquet
  refused 3 --text text.parquet
  contains "$stderr" "KVQ-E3003" "text.parquet: begins as Parquet"
  { words 100 && printf 'a\0b'; } | gzip >zero.gz
  refused 3 --text zero.gz
  contains "$stderr" "zero.gz: byte " "is zero"
}

@test "lines that are no documents" {
  bad() {
    { head -3 "$SHARED_DIR/docs.jsonl" && echo "$1"; } >bad.jsonl
    refused 3 --text bad.jsonl
    contains "$stderr" "KVQ-E3002" "bad.jsonl: line 4: $2" "--text-field"
  }
  bad '{"text": "unfinished' "not JSON"
  bad 'plain text' "not JSON"
  bad '["text"]' "is not a JSON object"
  bad '{"body": "x"}' "field 'text' is missing"
  bad '{"text": 5}' "field 'text' is not a string"
  bad '{"text": "a\u0000b"}' "a string holds a zero character"
}

@test "empty and short texts, alone and among others" {
  : >empty.txt
  gzip -c empty.txt >empty.gz
  : >empty.jsonl
  echo hello >short.txt
  for file in empty.txt empty.gz empty.jsonl short.txt; do
    refused 3 --text $file
    contains "$stderr" "KVQ-E3002" "$file: the text has " "one window needs 32"
    refused 3 --text "$SHARED_DIR/text.txt" --text $file --mix text.txt=1,$file=1
    contains "$stderr" "$file: the text has "
    fails 3 kvq-validate --model "$(MODEL)" --text $file --seq-len 32
    contains "$stderr" "$file: the text has "
  done
  # in proportion to tokens such a text has no share
  succeeds kvq-calibrate --model "$(MODEL)" $SMALL --text "$SHARED_DIR/text.txt" --text short.txt -o out.kvq.h5
  contains "$stderr" "short.txt: none of the 4 windows comes from it"
}

@test "a text with fewer tokens than windows want gives overlapping ones, and says so" {
  head -2 "$SHARED_DIR/text.txt" >few.txt
  succeeds kvq-calibrate --model "$(MODEL)" --samples 40 --seq-len 32 --text few.txt -o out.kvq.h5
  contains "$stderr" "warning" "few.txt has fewer than 40 x 32 tokens, so windows overlap"
}

@test "standard input can be read once: for validation, not for drawn windows" {
  refused 3 --text - </dev/null
  contains "$stderr" "--text -" "read twice"
  refused 3 --text - < <(cat "$SHARED_DIR/text.txt")
  contains "$stderr" "--text -" "read twice"
  cat "$SHARED_DIR/text.txt" | kvq-validate -q --model "$(MODEL)" --text - --seq-len 32 --windows 3 --json >piped.json
  kvq-validate -q --model "$(MODEL)" --text "$SHARED_DIR/text.txt" --seq-len 32 --windows 3 --json >read.json
  [ "$(kvq_json_tool text token_ids_sha256 <piped.json)" = "$(kvq_json_tool text token_ids_sha256 <read.json)" ]
  [ "$(kvq_json_tool text source <piped.json)" = "standard input" ]
  [ "$(kvq_json_tool text sha256 <piped.json)" = "$(sha256sum <"$SHARED_DIR/text.txt" | cut -d' ' -f1)" ]
}

@test "validation takes the same sample sets, in order" {
  validate() { kvq-validate -q --model "$(MODEL)" --seq-len 32 --json "$@"; }
  validate --text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt" >all.json
  a=$(validate --text "$SHARED_DIR/text.txt" | kvq_json_tool windows)
  b=$(validate --text "$SHARED_DIR/other.txt" | kvq_json_tool windows)
  [ "$(kvq_json_tool windows <all.json)" -eq $((a + b)) ]
  [ "$(kvq_json_tool text source <all.json)" = "text.txt + other.txt" ]
  validate --text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt" --windows 8 --mix text.txt=1,other.txt=1 >mixed.json
  [ "$(kvq_json_tool windows <mixed.json)" = 8 ]
  fails 3 kvq-validate --model "$(MODEL)" --seq-len 32 --text "$SHARED_DIR/text.txt" --text "$SHARED_DIR/other.txt" \
    --windows $((2 * a)) --mix text.txt=1,other.txt=1
  contains "$stderr" "other.txt: has $b windows, but $a of the $((2 * a)) were to come from it"
  validate --text "$SHARED_DIR/docs.jsonl" --documents kept >kept.json
  validate --text "$SHARED_DIR/docs.jsonl" >joined.json
  [ "$(kvq_json_tool windows <kept.json)" -lt "$(kvq_json_tool windows <joined.json)" ]
}

@test "--bos auto scores both ways; the plan says what that costs; other policies do not" {
  run_auto() { succeeds kvq-calibrate --model "$(MODEL)" $SMALL --text "$SHARED_DIR/text.txt" -o out.kvq.h5 --force "$@"; }
  run_auto
  contains "$stderr" "bos        auto: 2 windows of 32 tokens are scored with and without one first, " " TFLOP" \
    " nats per token with a BOS token, "
  [[ $stderr != *warning* ]]
  run_auto --dry-run
  contains "$stderr" "bos        auto: 2 windows"
  [[ $stderr != *"nats per token"* ]]
  for bos in always never; do
    run_auto --bos $bos
    [[ $stderr != *"bos  "* ]]
  done
  npy_ids ids.npy $(for i in {1..200}; do echo $((i * i % 61)); done)
  succeeds kvq-calibrate --model "$(MODEL)" --tokens ids.npy $SMALL -o tokens.kvq.h5
  [[ $stderr != *"bos  "* ]]
  succeeds kvq-calibrate --model "$(MODEL)" --text self $SMALL -o self.kvq.h5
  [[ $stderr != *"bos  "* ]]
}

@test "a tokenizer that is wrong about the BOS token of its model is found out" {
  shared=${KVQ_SHARED:-$SOURCE/../shared}
  [ -r "$shared/models/stories15M/config.json" ] || skip "no reference data; set KVQ_SHARED"
  mkdir model
  ln -s "$(realpath "$shared")"/models/stories15M/* model/
  rm model/tokenizer_config.json
  run_auto() {
    succeeds kvq-calibrate --model model --text "$shared/data/tinystories_val_head.txt" --samples 2 --seq-len 64 \
      --weighting none -o out.kvq.h5 --force
  }
  # in the middle of a story, this model is 0.53 nats worse behind a BOS token
  echo '{"add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"}' >model/tokenizer_config.json
  run_auto
  contains "$stderr" "warning" "far better without a BOS token in front" "--bos never"
  echo '{"add_bos_token": false, "bos_token": "<s>", "eos_token": "</s>"}' >model/tokenizer_config.json
  run_auto
  [[ $stderr != *"far better"* ]]
}
