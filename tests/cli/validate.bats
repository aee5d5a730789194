# SPDX-License-Identifier: Apache-2.0
# The report files of kvq-validate, verdicts, and the comparison with an earlier report.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  words 40 5000 >"$SHARED_DIR/held.txt"
  kvq-calibrate -q --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o "$SHARED_DIR/a.kvq.h5"
  kvq-calibrate -q --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL --bits 2 -o "$SHARED_DIR/b.kvq.h5"
  kvq-validate -q --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" --text "$SHARED_DIR/held.txt" --threads 1 \
    --json >"$SHARED_DIR/base.json"
}

validate() {
  kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" --text "$SHARED_DIR/held.txt" --threads 1 "$@"
}
baseline_only() { kvq-validate --model "$SHARED_DIR/model" --text "$SHARED_DIR/held.txt" --seq-len 32 --threads 1 "$@"; }
base() { kvq_json_tool "$@" <"$SHARED_DIR/base.json"; }

# A limit inside of its interval, which therefore decides nothing.
open_gate() { awk -v a="$(base dppl mean)" -v b="$(base dppl high)" 'BEGIN { printf "dppl<=%.4f%%\n", 50 * (a + b) }'; }

# exits CODE COMMAND...
exits() {
  local code=$1
  shift
  run --separate-stderr "$@"
  show
  [ "$status" -eq "$code" ]
}

# xpath EXPRESSION FILE: the value, as text.
xpath() {
  command -v xmllint >/dev/null || skip "no xmllint"
  xmllint --xpath "string($1)" "$2"
}

well_formed() {
  command -v xmllint >/dev/null || skip "no xmllint"
  xmllint --noout "$@"
}

# ---------------------------------------------------------------- JSON

conforms() {
  python3 - "$SOURCE/docs/schema/kvq.validate-1.json" "$@" <<'EOF'
import json, sys
import jsonschema
schema = json.load(open(sys.argv[1]))
jsonschema.Draft202012Validator.check_schema(schema)
checker = jsonschema.Draft202012Validator(schema)
bad = [f"{name}: {e.json_path}: {e.message}" for name in sys.argv[2:] for e in checker.iter_errors(json.load(open(name)))]
def described(at, path):
    for key, value in at.get("properties", {}).items():
        if not value.get("description"): bad.append(f"{path}.{key}: not described")
        described(value, f"{path}.{key}")
described(schema, "")
for name, value in schema["$defs"].items(): described(value, name)
print("\n".join(bad))
sys.exit(bool(bad))
EOF
}

@test "every document conforms to the schema, which knows every key" {
  python3 -c 'import jsonschema' || skip "no python3-jsonschema"
  baseline_only --json >alone.json
  exits 1 validate --gate "$(open_gate)" --gate 'kld.mean<=0' --gate 'top1>=0' --json
  echo "$output" >gates.json
  validate --windows 1 --json >one.json
  validate --protocol decode --prompt 10 --json >decode.json
  validate --layer-windows 0 --noise-windows 0 --json >little.json
  validate --baseline "$SHARED_DIR/base.json" --json >compared.json
  kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" --text self --seed 18446744073709551615 \
    --windows 2 --threads 1 --json >self.json
  kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" --passkey 400 --gate 'passkey>=0' \
    --inconclusive pass --threads 1 --json >passkey.json || true # it retrieves nothing, and fails
  conforms passkey.json alone.json gates.json one.json decode.json little.json compared.json self.json "$SHARED_DIR/base.json"
}

@test "a key that the schema does not know is found" {
  python3 -c 'import jsonschema' || skip "no python3-jsonschema"
  sed 's/"compute":/"surprise": 1, "compute":/' "$SHARED_DIR/base.json" >more.json
  run conforms more.json
  [ "$status" -eq 1 ]
  contains "$output" surprise
}

# ---------------------------------------------------------------- verdicts

@test "exit codes of verdicts: 0 all pass, 1 one fails, 7 one is open; --inconclusive says what open means" {
  exits 0 validate --gate 'top1>=0'
  exits 7 validate --gate 'top1>=0' --gate "$(open_gate)"
  contains "$output" INCONCLUSIVE "result: INCONCLUSIVE"
  exits 1 validate --gate 'kld.mean<=0' --gate "$(open_gate)"
  exits 0 validate --gate "$(open_gate)" --inconclusive pass
  exits 1 validate --gate "$(open_gate)" --inconclusive fail
  exits 0 validate --gate 'dppl<=100%' --gate-mode point
}

# ---------------------------------------------------------------- JUnit

@test "JUnit: a case per gate, failures and what is open, every number a property" {
  exits 1 validate --gate 'top1>=0' --gate "$(open_gate)" --gate 'kld.mean<=0' --junit j.xml
  well_formed j.xml
  [ "$(xpath 'count(//testcase)' j.xml)" = 4 ]
  [ "$(xpath '/testsuites/@tests' j.xml)" = 4 ]
  [ "$(xpath '/testsuites/@failures' j.xml)" = 1 ]
  [ "$(xpath '//testsuite/@skipped' j.xml)" = 1 ]
  [ "$(xpath 'count(//testcase[@name="scored"]/*[not(self::system-out)])' j.xml)" = 0 ]
  contains "$(xpath '//testcase[@name="kld.mean<=0"]/failure/@message' j.xml)" "measured " "interval " "limit at most 0.00000 nats"
  contains "$(xpath '//testcase[starts-with(@name,"dppl")]/skipped/@message' j.xml)" "scored tokens would decide"
  [ "$(xpath '//property[@name="kld.mean"]/@value' j.xml)" = "$(base kld mean)" ]
  [ "$(xpath '//property[@name="dppl.low"]/@value' j.xml)" = "$(base dppl low)" ]
  [ "$(xpath '//property[@name="layer.1.k.nmse"]/@value' j.xml)" = "$(base layers 1 k nmse)" ]
  [ "$(xpath '//property[@name="by_position.0.tokens"]/@value' j.xml)" = "$(base by_position 0 tokens)" ]
}

@test "JUnit without gates has the case that says something was scored; open gates may be failures" {
  baseline_only --junit alone.xml
  [ "$(xpath 'count(//testcase)' alone.xml)" = 1 ]
  [ "$(xpath '//testcase/@name' alone.xml)" = scored ]
  exits 1 validate --gate "$(open_gate)" --inconclusive fail --junit open.xml
  [ "$(xpath '//testcase/failure/@type' open.xml)" = inconclusive ]
  [ "$(xpath '/testsuites/@skipped' open.xml)" = 0 ]
}

# ---------------------------------------------------------------- Markdown

@test "Markdown: verdict, metrics, gates, layers and the command, in a few KiB" {
  exits 1 validate --gate 'kld.mean<=0' --markdown m.md
  contains "$(cat m.md)" "kvq-validate: FAIL" "| Perplexity, change | " " % to " "| kld.mean&lt;=0 | fail | " "| worst layers |" \
    "kvq-validate --model model --artifact a.kvq.h5 --text held.txt --gate 'kld.mean<=0'"
  [ "$(wc -c <m.md)" -lt 6000 ]
  run ! grep -F "$SHARED_DIR" m.md
}

@test "--markdown auto adds to the summary of a job" {
  echo "before" >summary.md
  GITHUB_STEP_SUMMARY=$PWD/summary.md succeeds validate --markdown auto
  [ "$(head -1 summary.md)" = before ]
  contains "$(cat summary.md)" "kvq-validate: MEASURED"
  [ ! -e auto ]
  GITHUB_STEP_SUMMARY='' fails 2 validate --markdown auto
  contains "$stderr" GITHUB_STEP_SUMMARY
  GITHUB_STEP_SUMMARY=no/such/summary.md fails 6 validate --markdown auto
}

# ---------------------------------------------------------------- CSV

@test "CSV: a row per layer with as many fields as the header" {
  validate --csv c.csv
  [ "$(wc -l <c.csv)" -eq $(($(base layers) + 1)) ]
  head -1 c.csv | grep -q '^layer,attention_error,attention_error_low,attention_error_high,k_nmse,'
  [ "$(tr -cd ',\n' <c.csv | sort -u | wc -l)" -eq 1 ]
  [ "$(sed -n 2p c.csv | cut -d, -f1,2,5)" = "0,$(base layers 0 attention_error mean),$(base layers 0 k nmse)" ]
  run ! grep -i nan c.csv
  # what is measured and what calibration knew are of the same size
  [ "$(awk -F, 'NR > 1 && ($9 < 0.7 * $18 || $9 > 1.3 * $18 || $14 < 0.7 * $22 || $14 > 1.3 * $22)' c.csv)" = "" ]
  fails 2 baseline_only --csv other.csv
  fails 2 validate --layer-windows 0 --csv other.csv
  contains "$stderr" "--csv" "--layer-windows"
}

# ---------------------------------------------------------------- lm-evaluation-harness

@test "lm-evaluation-harness: every metric with its error, and the keys that its viewers read" {
  validate --lm-eval-json l.json
  lm() { kvq_json_tool "$@" <l.json; }
  [ "$(lm results kvq_held_txt "kld.mean,none")" = "$(base kld mean)" ]
  [ "$(lm results kvq_held_txt "kld.mean_stderr,none")" = "$(base kld stderr)" ]
  [ "$(lm results kvq_held_txt "effective_bits_stderr,none")" = N/A ]
  [ "$(lm results kvq_held_txt alias)" = kvq_held_txt ]
  [ "$(lm versions kvq_held_txt)" = 1 ]
  [ "$(lm n-shot kvq_held_txt)" = 0 ]
  [ "$(lm higher_is_better kvq_held_txt top1)" = true ]
  [ "$(lm higher_is_better kvq_held_txt kld.mean)" = false ]
  [ "$(lm n-samples kvq_held_txt effective)" = "$(base windows)" ]
  [ "$(lm git_hash)" = null ]
  contains "$(lm config model_args)" pretrained=model kv_cache=a.kvq.h5
}

# ---------------------------------------------------------------- HTML

@test "HTML: one page that needs nothing else, with pictures when gnuplot is there" {
  exits 1 validate --gate 'kld.mean<=0' --html h.html
  well_formed h.html
  contains "$(cat h.html)" '<!DOCTYPE html>' "FAIL" "Perplexity, change" "kld.mean&lt;=0" "The same again"
  run ! grep -Eo '<script|javascript:|<link|<img|href="http|src=' h.html
  if command -v gnuplot >/dev/null; then
    [ "$(grep -o '<svg ' h.html | wc -l)" -eq 5 ]
    [[ $stderr != *gnuplot* ]]
  fi
}

@test "HTML of equal results has equal bytes, wherever it is written" {
  mkdir elsewhere
  validate -q --gate 'top1>=0' --html one.html
  validate -q --gate 'top1>=0' --threads 2 --json --html elsewhere/two.html
  cmp one.html elsewhere/two.html
}

@test "HTML without gnuplot: tables, one warning, a note" {
  # only the program under test is in PATH
  succeeds env PATH="$KVQ_BUILD/bin" kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" \
    --text "$SHARED_DIR/held.txt" --threads 1 --html h.html
  [ "$(grep -c 'gnuplot' <<<"$stderr")" -eq 1 ]
  contains "$stderr" "warning: --html: gnuplot is not installed"
  contains "$(cat h.html)" "no pictures" "Perplexity, change"
  run ! grep '<svg' h.html
  well_formed h.html
}

@test "a gnuplot that fails costs the pictures, not the report" {
  mkdir bin
  printf '#!/bin/sh\nexit 1\n' >bin/gnuplot
  chmod +x bin/gnuplot
  PATH=$PWD/bin:$PATH succeeds validate --html h.html
  contains "$stderr" "warning: --html: gnuplot failed"
  printf '#!/bin/sh\necho "<svg><script>"\n' >bin/gnuplot
  PATH=$PWD/bin:$PATH succeeds validate --html h.html -f
  contains "$stderr" "warning: --html: gnuplot failed"
  well_formed h.html
}

@test "the model alone: every report but that of layers" {
  succeeds baseline_only --gate 'ppl<=1e9' --junit j.xml --markdown m.md --html h.html --lm-eval-json l.json
  well_formed j.xml h.html
  contains "$(cat m.md)" "kvq-validate: PASS" "Perplexity, full precision"
  kvq_json_tool results kvq_held_txt "baseline.ppl,none" <l.json
  run ! grep -E 'quantised|<svg' h.html
}

# ---------------------------------------------------------------- names

@test "names that mean something to XML, Markdown or a shell, and names that are no UTF-8" {
  odd=$'a<&">\'|`*\x01\xff$(x).txt'
  cp "$SHARED_DIR/held.txt" "$odd"
  cp "$SHARED_DIR/a.kvq.h5" $'<b>&\xfe.kvq.h5'
  exits 1 kvq-validate --model "$SHARED_DIR/model" --artifact $'<b>&\xfe.kvq.h5' --text "$odd" --threads 1 --gate 'kld.mean<=0' \
    --junit j.xml --markdown m.md --csv c.csv --html h.html --lm-eval-json l.json --json
  json text source >/dev/null
  well_formed j.xml h.html
  kvq_json_tool n-samples <l.json
  iconv -f UTF-8 -t UTF-8 m.md h.html j.xml l.json >/dev/null
  contains "$(cat m.md)" '* Text: a&lt;&amp;&quot;&gt;' '\|\`\*'
  run ! grep -F '<b>' h.html
}

# ---------------------------------------------------------------- where reports go

@test "a report that exists is kept unless --force is given, which is found out first" {
  for kind in junit markdown csv html lm-eval-json; do
    echo precious >out
    fails 2 validate --$kind out
    contains "$stderr" "KVQ-E2002" "already exists" "--force"
    [[ $stderr != *"model "* ]]
    [ "$(cat out)" = precious ]
    succeeds validate -q --$kind out --force
    [ "$(cat out)" != precious ]
  done
}

@test "a report is no input and no other report, and its folder must be there" {
  cp "$SHARED_DIR/held.txt" text.txt
  fails 2 kvq-validate --model "$SHARED_DIR/model" --text text.txt --junit text.txt --force
  contains "$stderr" "--junit text.txt: this file is an input"
  cp "$SHARED_DIR/base.json" base.json
  fails 2 validate --baseline base.json --html ./base.json --force
  contains "$stderr" "--html ./base.json: this file is an input"
  fails 2 validate --junit same --html ./same
  contains "$stderr" "--html ./same: --junit has the same file"
  fails 2 validate --html -
  contains "$stderr" "--html -"
  fails 6 validate --junit no/such/folder/j.xml
  contains "$stderr" "KVQ-E6002" "no/such/folder"
}

@test "a failing gate does not cost the reports" {
  exits 1 validate --gate 'kld.mean<=0' --junit j.xml --json
  [ "$(ls -A)" = j.xml ]
  [ "$(json gates 0 verdict)" = fail ]
}

# ---------------------------------------------------------------- an earlier report

@test "--baseline and the gates on it need each other, and an artifact" {
  fails 2 validate --max-regression 2%
  contains "$stderr" "--max-regression" "--baseline"
  fails 2 validate --gate 'regression.kld<=2%'
  contains "$stderr" "regression.kld" "--baseline"
  fails 2 baseline_only --baseline "$SHARED_DIR/base.json"
  contains "$stderr" "--baseline" "--artifact"
  fails 2 validate --baseline "$SHARED_DIR/base.json" --max-regression -1%
}

@test "an earlier report of other windows is refused, and what differs is named" {
  differs() {
    fails 3 validate --baseline "$1" "${@:3}"
    contains "$stderr" KVQ-E3004 "$1" "$2"
  }
  cp "$SHARED_DIR/base.json" base.json
  differs base.json windows --windows 2
  differs base.json seq_len --seq-len 16
  differs base.json protocol --protocol decode
  words 40 7000 >other.txt
  fails 3 kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/a.kvq.h5" --text other.txt --windows "$(base windows)" \
    --baseline base.json
  contains "$stderr" KVQ-E3004 "token ids"
  validate -q --protocol decode --prompt 10 --json >decode.json
  differs decode.json prompt --protocol decode --prompt 11
}

@test "what is no report is refused" {
  fails 3 validate --baseline none.json
  contains "$stderr" KVQ-E3001
  fails 4 validate --baseline "$SHARED_DIR/held.txt"
  echo '{"schema": "kvq.artifact/1"}' >other.json
  fails 3 validate --baseline other.json
  contains "$stderr" KVQ-E3002 "kvq.artifact/1"
  echo '[]' >list.json
  fails 3 validate --baseline list.json
  sed 's,kvq.validate/1,kvq.validate/2,' "$SHARED_DIR/base.json" >newer.json
  fails 4 validate --baseline newer.json
  contains "$stderr" KVQ-E4002 "kvq.validate/2"
  baseline_only -q --json >alone.json
  fails 3 validate --baseline alone.json
  contains "$stderr" "measured no artifact"
  sed 's/"token_ids_sha256"/"token_ids"/' "$SHARED_DIR/base.json" >less.json
  fails 3 validate --baseline less.json
  contains "$stderr" "token_ids_sha256" "missing"
  sed 's/"window_nll":	\[/&null, /' "$SHARED_DIR/base.json" >null.json
  fails 3 validate --baseline null.json
  contains "$stderr" "window_nll"
  head -c 500 "$SHARED_DIR/base.json" >cut.json
  fails 4 validate --baseline cut.json
}

@test "the same again regresses by nothing; fewer bits do" {
  validate -q --baseline "$SHARED_DIR/base.json" --json >same.json
  [ "$(kvq_json_tool regression ppl mean <same.json)" = 0 ]
  [ "$(kvq_json_tool regression kld mean <same.json)" = 0 ]
  [ "$(kvq_json_tool regression baseline <same.json)" = base.json ]
  exits 0 validate --baseline "$SHARED_DIR/base.json" --max-regression 0% --gate 'regression.kld<=0%' --junit j.xml --markdown m.md
  [ "$(xpath 'count(//testcase)' j.xml)" = 3 ]
  [ "$(xpath '//property[@name="regression.ppl"]/@value' j.xml)" = 0 ]
  contains "$(cat m.md)" "Compared with: base.json" "--baseline base.json --max-regression 0%"
  exits 1 kvq-validate --model "$SHARED_DIR/model" --artifact "$SHARED_DIR/b.kvq.h5" --text "$SHARED_DIR/held.txt" --threads 1 \
    --baseline "$SHARED_DIR/base.json" --gate 'regression.kld<=7%' --json
  [ "$(json gates 0 expression)" = 'regression.kld<=7%' ]
  [ "$(json gates 0 verdict)" = fail ]
  exits 0 validate --baseline "$SHARED_DIR/base.json" --max-regression 7% --json
  [ "$(json gates 0 expression)" = 'regression.ppl<=7%' ]
}

# ---------------------------------------------------------------- the workflow of docs/ci

# step NAME: its shell commands.
step() {
  python3 -c '
import sys, yaml
steps = yaml.safe_load(open(sys.argv[1]))["jobs"]["validate"]["steps"]
print(next(s["run"] for s in steps if s.get("name") == sys.argv[2]))' "$SOURCE/docs/ci/kvq.yml" "$1"
}

@test "the workflow of docs/ci: its gates run, its summary and reports come" {
  python3 -c 'import yaml' || skip "no python3-yaml"
  mkdir -p kvq/build
  ln -s "$KVQ_BUILD/bin" kvq/build/bin
  step "Run the gates" >gates.sh
  export MODEL=$SHARED_DIR/model ARTIFACT=$SHARED_DIR/a.kvq.h5 TEXT=$SHARED_DIR/held.txt WINDOWS=3 BASELINE=
  GITHUB_STEP_SUMMARY=$PWD/summary.md exits 1 bash -e gates.sh # no limit for random weights
  well_formed reports/kvq.xml reports/kvq.html
  contains "$(cat summary.md)" "kvq-validate: FAIL"
  [ "$(kvq_json_tool gates <reports/kvq.json)" = 3 ]
  mv reports/kvq.json base.json
  BASELINE=base.json GITHUB_STEP_SUMMARY=$PWD/summary.md exits 1 bash -e gates.sh
  [ "$(kvq_json_tool gates 3 expression <reports/kvq.json)" = 'regression.ppl<=2%' ]
  [ "$(grep -c '^### kvq-validate' summary.md)" -eq 2 ]
}
