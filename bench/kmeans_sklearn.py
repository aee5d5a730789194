#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""kvq's codebook against scikit-learn's k-means on the same weighted points: time, and the error that is left.

Both get the same positions and weights. kvq: `kvq-bench fit --points`, from the points to the levels, counting included.
scikit-learn: KMeans as the public code of KVQuant calls it, k-means++ once and at most 50 rounds of Lloyd. The error of
either is the sum of weight * (position - nearest level)^2 in f64 over all points, not what the programs say of themselves.

Points are made up: a mixture of normal distributions, cut off at -1 and 1, with log-normal weights whose largest lies
--decades above the median, as squared gradients do. Or they are one tensor of a capture (kvq-capture --with-fisher).

Needs Python 3 with numpy and scikit-learn, for --capture also h5py. Exits with 1 when kvq's error is the larger one.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time

try:
    import numpy as np
    import sklearn
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # scikit-learn needs it itself
except ImportError as missing:
    sys.exit(f"kmeans_sklearn.py: {missing}; it needs: pip install numpy scikit-learn")

CHUNK = 1 << 22


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=6_000_000, metavar="N", help="how many to make up (6 million)")
    parser.add_argument("--decades", type=float, default=7, metavar="D", help="weights: from the median to the largest (7)")
    parser.add_argument("--capture", metavar="FILE", help="points of a capture with squared gradients instead")
    parser.add_argument("--layer", type=int, default=0, metavar="L", help="of the capture (0)")
    parser.add_argument("--tensor", choices=["k", "v"], default="k", help="of the capture (k)")
    parser.add_argument("--outliers", type=float, default=0.01, metavar="O", help="of the capture: share left out (0.01)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], metavar="B", help="2^B levels (2 3 4)")
    parser.add_argument("--max-iter", type=int, default=50, metavar="N", help="rounds of Lloyd at most (50)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of points and of k-means++ (0)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of kvq, of which the median counts (5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of both programs")
    parser.add_argument("--kvq-bench", default="build/bin/kvq-bench", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser.parse_args()


def make_points(n, decades, seed):
    """Positions and weights [n], f32."""
    generator = np.random.default_rng(seed)
    centres, widths, shares = np.array([-0.45, 0.0, 0.3]), np.array([0.22, 0.35, 0.12]), [0.25, 0.5, 0.25]
    # the largest of n normal numbers lies about sqrt(2 ln n) above their middle
    sigma = decades * math.log(10) / math.sqrt(2 * math.log(max(n, 2)))
    x, w = np.empty(n, np.float32), np.empty(n, np.float32)
    for at in range(0, n, CHUNK):
        end = min(at + CHUNK, n)
        part = generator.choice(3, end - at, p=shares)
        x[at:end] = np.clip(generator.normal(centres[part], widths[part]), -1, 1)
        w[at:end] = 2.5e-12 * np.exp(sigma * generator.standard_normal(end - at))
    return x, w


def read_points(path, layer, tensor, outliers):
    """Normalised elements between the quantiles of their channel (K) or token (V), and squared gradients times r^2."""
    import h5py

    with h5py.File(path) as file:
        group = file[f"layers/{layer:03d}"]
        if "fisher_" + tensor not in group:
            sys.exit(f"kmeans_sklearn.py: {path} has no squared gradients; write it with kvq-capture --with-fisher")
        x, g = group[tensor][:].astype(np.float32), group["fisher_" + tensor][:].astype(np.float32)
    rows = x.shape[0] * x.shape[1]
    x, g = x.reshape(rows, -1), g.reshape(rows, -1)
    axis = 0 if tensor == "k" else 1
    low, high = np.quantile(x, [outliers / 2, 1 - outliers / 2], axis=axis, keepdims=True).astype(np.float32)
    z, r = (low + high) / 2, (high - low) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        normalised = (x - z) / r
    inside = np.abs(normalised) <= 1  # not a number, where r is 0, is not
    return normalised[inside], (g * r * r)[inside]


def error_of(levels, x, w):
    levels = np.sort(np.asarray(levels, np.float64))
    middles, total = (levels[1:] + levels[:-1]) / 2, 0.0
    for at in range(0, len(x), CHUNK):
        part = x[at : at + CHUNK].astype(np.float64)
        total += np.dot(w[at : at + CHUNK].astype(np.float64), (part - levels[np.searchsorted(middles, part)]) ** 2)
    return float(total)


def run_kvq(arguments, path, bits):
    """Seconds, of that counting, levels."""
    command = [arguments.kvq_bench, "fit", "--points", path, "--bits", str(bits), "--json"]
    command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if run.returncode != 0:
        sys.exit(run.stderr)
    report = json.loads(run.stdout)
    rows = {row["name"]: row["median"] for row in report["results"]}
    levels = [rows[f"level {i}, {bits} bits"] for i in range(2**bits)]
    return rows[f"codebook from points, {bits} bits"], rows[f"of that counting, {bits} bits"], levels


def run_sklearn(arguments, x, w, bits):
    """Seconds, rounds, levels."""
    model = KMeans(
        n_clusters=2**bits, init="k-means++", n_init=1, max_iter=arguments.max_iter, random_state=arguments.seed
    )
    with threadpool_limits(arguments.threads):
        start = time.perf_counter()
        model.fit(x.reshape(-1, 1), sample_weight=w)
        seconds = time.perf_counter() - start
    return seconds, int(model.n_iter_), model.cluster_centers_.ravel()


def compare(arguments, path, x, w, bits):
    kvq_s, counting_s, kvq_levels = run_kvq(arguments, path, bits)
    sklearn_s, rounds, sklearn_levels = run_sklearn(arguments, x, w, bits)
    kvq_error, sklearn_error = error_of(kvq_levels, x, w), error_of(sklearn_levels, x, w)
    return {
        "bits": bits,
        "points": len(x),
        "kvq_s": kvq_s,
        "kvq_counting_s": counting_s,
        "sklearn_s": sklearn_s,
        "sklearn_rounds": rounds,
        "times_faster": sklearn_s / kvq_s,
        "kvq_error": kvq_error,
        "sklearn_error": sklearn_error,
        "sklearn_excess": sklearn_error / kvq_error - 1 if kvq_error > 0 else 0.0,
    }


def main():
    arguments = parse_arguments()
    if arguments.capture:
        x, w = read_points(arguments.capture, arguments.layer, arguments.tensor, arguments.outliers)
    else:
        x, w = make_points(arguments.points, arguments.decades, arguments.seed)
    if not arguments.json:
        print(f"{len(x)} points, {arguments.threads} threads, scikit-learn {sklearn.__version__}")
        print("bits      kvq s  (counting)  sklearn s  rounds    faster    kvq error  sklearn error   excess", flush=True)
    results = []
    with tempfile.NamedTemporaryFile(suffix=".points") as file:
        for at in range(0, len(x), CHUNK):
            np.stack([x[at : at + CHUNK], w[at : at + CHUNK]], axis=1).astype("<f4").tofile(file)
        file.flush()
        for bits in arguments.bits:
            r = compare(arguments, file.name, x, w, bits)
            results.append(r)
            if not arguments.json:
                print(
                    f"{bits:4} {r['kvq_s']:10.4f} {r['kvq_counting_s']:11.4f} {r['sklearn_s']:10.2f}"
                    f" {r['sklearn_rounds']:7} {r['times_faster']:8.1f}x {r['kvq_error']:12.6g}"
                    f" {r['sklearn_error']:14.6g} {100 * r['sklearn_excess']:7.3f}%",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps({"sklearn": sklearn.__version__, "threads": arguments.threads, "results": results}, indent=1))
    return any(r["kvq_error"] > r["sklearn_error"] for r in results)


if __name__ == "__main__":
    sys.exit(main())
