#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What each choice of a quantised cache is worth: calibrates and validates one setting after the other with kvq's
programs and prints a table for docs/results.md.

    bench/ablation.py ladder   MODEL CALIBRATION_TEXT EVALUATION_TEXT WORK_FOLDER
    bench/ablation.py compat   ...      the public code's rules, 4 windows drawn by Python's generator
    bench/ablation.py defaults ...      settings at comparable bits
    bench/ablation.py presets  ...      the channel-allocated format beside KVQuant
    bench/ablation.py allocated ...     what each of its ingredients is worth at 2.75 bits

Settings of a study that measure the same are fitted from one measurement file. Everything made stays in WORK_FOLDER, so
a run that was stopped goes on. Differences are paired over the windows; +- is one standard error. Needs python3 alone.
"""
import argparse
import json
import math
import os
import subprocess
import sys

PER_TOKEN = "--k-axis token --k-domain post_rope"
POST_ROPE = "--k-domain post_rope"

# name: (options of the measurement, options of the fit); a measurement None is a direct calibration with both.
LADDER = {
    "int3 (integer zero point), K per token, post-RoPE": (None, f"{PER_TOKEN} --sink-tokens 0 --datatype int-clamped --weighting none --outliers 0"),
    "int3, K per token, post-RoPE": (None, f"{PER_TOKEN} --sink-tokens 0 --datatype int --weighting none --outliers 0"),
    "int3, K per channel, post-RoPE": (None, f"{POST_ROPE} --sink-tokens 0 --datatype int --weighting none --outliers 0"),
    "int3, K per channel, pre-RoPE": ("--sink-tokens 0 --outliers 0,1%", "--datatype int --outliers 0"),
    "nf3": ("--sink-tokens 0 --outliers 0,1%", "--datatype nf --outliers 0"),
    "nuq3, unweighted": ("--sink-tokens 0 --outliers 0,1%", "--weighting none --outliers 0"),
    "nuq3, fisher": ("--sink-tokens 0 --outliers 0,1%", "--weighting fisher --outliers 0"),
    "nuq3, fisher-scaled": ("--sink-tokens 0 --outliers 0,1%", "--outliers 0"),
    "nuq3-1%, K thresholds of the matrix, 8 slots": (None, "--sink-tokens 0 --threshold-scope matrix --k-outlier-slots 8"),
    "nuq3-1%, K thresholds per channel, 8 slots": ("--sink-tokens 0 --outliers 1% --k-outlier-slots 8", "--outliers 1%"),
    "nuq3-1%, K thresholds per channel": ("--sink-tokens 0 --outliers 0,1%", "--outliers 1%"),
    "nuq3-1% + sink": ("--sink-tokens 1 --outliers 0,0.25%,1%", "--outliers 1%"),
    "nuq2-1% + sink": ("--sink-tokens 1 --outliers 0,0.25%,1%", "--outliers 1% --bits 2"),
    "nuq2-1% + sink + Q-Norm": ("--sink-tokens 1 --outliers 0,0.25%,1%", "--outliers 1% --bits 2 --q-norm"),
}

COMPAT = {
    f"nuq{bits}-{share}{' + sink' if sinks else ''}": (
        f"--compat kvquant --sink-tokens {sinks} --outliers 0,1% --samples 4",
        f"--weighting fisher --bits {bits} --outliers {share}")
    for sinks, rows in ((0, ((3, "1%"), (4, "1%"), (3, "0"), (4, "0"), (2, "1%"))), (1, ((3, "1%"), (2, "1%"))))
    for bits, share in rows
}

SINK = "--sink-tokens 1 --outliers 0,0.25%,1%"
DEFAULTS = {
    "as usual (nuq3-1%, fisher-scaled)": (SINK, "--outliers 1%"),
    "weights: fisher": (SINK, "--outliers 1% --weighting fisher"),
    "weights: none": (SINK, "--outliers 1% --weighting none"),
    "a table per KV head": (SINK, "--outliers 1% --groups head"),
    "outliers 0.25 %": (SINK, "--outliers 0.25%"),
    "no outliers, K 3 and V 4 bits": (SINK, "--outliers 0 --k-bits 3 --v-bits 4"),
    "no outliers, K 4 and V 3 bits": (SINK, "--outliers 0 --k-bits 4 --v-bits 3"),
    "Q-Norm": (SINK, "--outliers 1% --q-norm"),
    "nf": (SINK, "--outliers 1% --datatype nf"),
    "recent window of 64": (SINK, "--outliers 1% --recent-window 64"),
    "2 bits": (SINK, "--outliers 1% --bits 2"),
    "2 bits, Q-Norm": (SINK, "--outliers 1% --bits 2 --q-norm"),
    "2 bits, a table per KV head": (SINK, "--outliers 1% --bits 2 --groups head"),
}

# The channel-allocated format at one budget, and one ingredient at a time changed or taken away.
TILES = f"{SINK} --allocated"
BUDGET = "--target-bits 2.75"
ALLOCATED = {
    "alloc-2.75": (TILES, BUDGET),
    "nuq3-1%": (SINK, "--outliers 1%"),
    "widths of single channels": (TILES, f"{BUDGET} --width-group 1"),
    "widths 1 to 4": (TILES, f"{BUDGET} --k-widths 1,2,3,4"),
    "widths 1, 2, 4": (TILES, f"{BUDGET} --k-widths 1,2,4"),
    "budget by layer": (TILES, f"{BUDGET} --budget layer"),
    "budget by head": (TILES, f"{BUDGET} --budget head"),
    "affine tables": (TILES, f"{BUDGET} --k-tables affine"),
    "no outliers": (TILES, f"{BUDGET} --outliers 0"),
    "outliers 1 %": (TILES, f"{BUDGET} --outliers 1%"),
    "values one by one": (TILES, f"{BUDGET} --v-dim 1"),
    "all layers' values at 3 bits": (TILES, f"{BUDGET} --v-rates 6"),
    "without measured KL": (TILES, f"{BUDGET} --kl-tokens 0"),
    "f16 scales": (f"{TILES} --v-scale f16", BUDGET),
    "values not rotated": (f"{TILES} --v-rotation none", BUDGET),
    "weights without gradients": (f"{TILES} --weighting range", BUDGET),
}
PRESETS = {
    "nuq3-1%": (SINK, "--outliers 1%"),
    "nuq2-1%": (SINK, "--outliers 1% --bits 2"),
    **{name: (TILES, f"--preset {name}") for name in ("alloc-3.4", "alloc-3", "alloc-2.75", "alloc-2.1")},
}
STUDIES = {"ladder": LADDER, "compat": COMPAT, "defaults": DEFAULTS, "allocated": ALLOCATED, "presets": PRESETS}


def slug(text):
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def run(program, *arguments):
    command = [os.path.join(OPTIONS.programs, program), *arguments]
    print("$", " ".join(command), file=sys.stderr)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def made(name, suffix):
    """Path of something that depends on model, calibration text and window length besides what `name` says."""
    base = f"{os.path.basename(OPTIONS.model)} {os.path.basename(OPTIONS.calibration)} {OPTIONS.seq_len} {name}"
    return os.path.join(OPTIONS.folder, slug(base) + suffix)


def artifact(measured, fit):
    """The artifact of one setting, made unless it is there."""
    source = ["--model", OPTIONS.model, "--text", OPTIONS.calibration, "--seq-len", str(OPTIONS.seq_len)]
    path = made(f"{measured or ''} {fit}", ".kvq.h5")
    if os.path.exists(path):
        return path
    if measured is None:
        run("kvq-calibrate", *source, "--progress", "none", "-q", *fit.split(), "-o", path)
        return path
    measurement = made(measured, ".kvqm.h5")
    if not os.path.exists(measurement):
        run("kvq-calibrate", *source, "--progress", "none", "-q", *measured.split(), "--measure-only", "-o", measurement)
    run("kvq-calibrate", "--from", measurement, "-q", "--progress", "none", *fit.split(), "-o", path)
    return path


def validate(path):
    text_name = slug(os.path.basename(OPTIONS.evaluation))
    result = path.removesuffix(".kvq.h5") + f".{text_name}.{OPTIONS.windows}x{OPTIONS.eval_len}.json"
    if not os.path.exists(result):
        text = run("kvq-validate", "-q", "--progress", "none", "--json", "--model", OPTIONS.model, "--artifact", path,
                   "--text", OPTIONS.evaluation, "--seq-len", str(OPTIONS.eval_len), "--windows", str(OPTIONS.windows),
                   "--bos", "never")
        with open(result, "w") as file:
            file.write(text)
    with open(result) as file:
        return json.load(file)


def paired(a, b):
    """Mean of a - b over windows, and its standard error."""
    d = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(d) / len(d)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d)) if len(d) > 1 else math.nan


def main():
    settings = STUDIES[OPTIONS.study]
    names = [n for n in settings if OPTIONS.only is None or OPTIONS.only in n]
    before = None
    print("| setting | ppl | change | mean KL | against the row above | top-1 | bits |\n|---|---|---|---|---|---|---|")
    for name in names:
        r = validate(artifact(*settings[name]))
        kl = r["kld"]
        if before is None:
            print(f"| full precision | {r['baseline']['ppl']:.4f} | | | | | 16 |")
        step = "" if before is None else "{:+.4f} +- {:.4f}".format(*paired(kl["windows"], before["kld"]["windows"]))
        print(f"| {name} | {r['quantized']['ppl']:.4f} | {100 * r['dppl']['mean']:+.2f} +- {100 * r['dppl']['stderr']:.2f} % "
              f"| {kl['mean']:.4f} +- {kl['stderr']:.4f} | {step} | {100 * r['top1']:.2f} % | {r['effective_bits']:.3f} |",
              flush=True)
        if not OPTIONS.against_first or before is None:
            before = r


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    for name in ("model", "calibration", "evaluation", "folder"):
        parser.add_argument(name)
    parser.add_argument("--programs", default="build/bin", help="folder of kvq's programs (build/bin)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a calibration window (2048)")
    parser.add_argument("--eval-len", type=int, default=2048, help="tokens of an evaluation window (2048)")
    parser.add_argument("--windows", type=int, default=16, help="windows to evaluate (16)")
    parser.add_argument("--only", help="settings whose name holds this text")
    parser.add_argument("--against-first", action="store_true", help="differences to the first row, not to the one above")
    OPTIONS = parser.parse_args()
    os.makedirs(OPTIONS.folder, exist_ok=True)
    main()
