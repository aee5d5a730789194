#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads a capture of kvq with h5py, and lets kvq read one that the example in docs/format.md wrote.

Shows that the description is enough: usage check_capture_h5py.py <test_capture> <docs/format.md>.
Exit codes: 0 = both understand each other, 1 = not, 77 = skipped because h5py is not installed.
"""
import os
import re
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy
except ImportError:
    print("skipped: python3 has no h5py")
    sys.exit(77)

PARTS = ("k", "v", "q", "fisher_k", "fisher_v")


def sums_of(file):
    """{(layer, part, window): sum} of all arrays, in the order in which kvq adds them up."""
    found = {}
    for name, layer in file["layers"].items():
        for part, x in layer.items():
            for window in range(x.shape[0]):
                found[int(name), part, window] = sum(map(float, x[window].ravel()))
    return found


def sums_by_kvq(kvq, path):
    read = subprocess.run([kvq, "--read", path], stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.split() for line in read.stdout.splitlines()]
    return {(int(layer), part, int(window)): float(value) for layer, part, window, value in lines}


def check_ours(kvq, path):
    subprocess.run([kvq, "--write-sample", path], check=True)
    with h5py.File(path, "r") as file:
        assert file.attrs["kvq_format"] == b"kvq.capture" and file.attrs["kvq_format_version"] == b"1.0"
        assert file["model"].attrs["rope_theta"] == 500000.1 and file["model"].attrs["architecture"] == b"llama"
        assert file["dataset"].attrs["seed"] == 2**64 - 8 and file["tokenizer"].attrs["bos_added"] == 1
        assert list(file["layers"]) == ["000", "002"]
        for layer in file["layers"].values():
            assert sorted(layer) == sorted(PARTS)
            for part, x in layer.items():
                assert x.shape == (2, 5, 4 if part == "q" else 2, 6) and x.dtype == numpy.float32 and x.fletcher32
        assert file["dataset/token_ids"][()].tolist() == [[i * 37 % 512 for i in range(5 * w, 5 * w + 5)] for w in (0, 1)]
        assert sums_of(file) == sums_by_kvq(kvq, path), "kvq and h5py read other numbers"


def check_example(kvq, path, page):
    with open(page, encoding="utf-8") as file:
        examples = [e for e in re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL) if "def write_capture" in e]
    assert len(examples) == 1, "docs/format.md has one example that writes a capture"
    names = {}
    exec(compile(examples[0], page, "exec"), names)
    random = numpy.random.default_rng(1)
    k, v = ([random.standard_normal((3, 7, 2, 4), dtype=numpy.float32) for _ in range(2)] for _ in "kv")
    names["write_capture"](path, k, v)
    found = sums_by_kvq(kvq, path)
    expected = {(l, p, w): sum(map(float, x[l][w].ravel())) for l in (0, 1) for p, x in zip("kv", (k, v)) for w in range(3)}
    assert found == expected, "kvq reads the example's file otherwise"


def main():
    kvq, page = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        check_ours(kvq, os.path.join(folder, "ours.kvqc.h5"))
        check_example(kvq, os.path.join(folder, "theirs.kvqc.h5"), page)
    print("h5py reads captures of kvq, and kvq reads those of the example")


if __name__ == "__main__":
    main()
