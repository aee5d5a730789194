#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads an artifact with h5py and computes its hashes from docs/format.md alone, before and after h5repack.

Shows that the format is complete without kvq: usage check_artifact_hash.py <test_artifact>. The same for the file of
format 1.0 in tests/data, whose rules for hashes are the same.
Exit codes: 0 = equal, 1 = not, 77 = skipped because h5py or h5repack is not installed.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy
except ImportError:
    print("skipped: python3 has no h5py")
    sys.exit(77)

TYPES = {"<i8": "i64", "<u8": "u64", "<f8": "f64", "<f4": "f32"}


def record(path, value):
    """(path, type, shape, bytes) of one dataset or attribute."""
    if isinstance(value, (bytes, numpy.bytes_)):
        return path, "utf8", "", bytes(value)
    value = numpy.asarray(value)
    return path, TYPES[value.dtype.str], ",".join(map(str, value.shape)), value.tobytes()


def records(path):
    found = []

    def visit(name, item):
        for key in item.attrs:
            value = item.attrs[key]
            found.append(record(f"/{name}@{key}", value.encode() if isinstance(value, str) else value))
        if isinstance(item, h5py.Dataset):
            found.append(record("/" + name, item[()]))

    with h5py.File(path, "r") as file:
        visit("", file)
        file.visititems(visit)
    return sorted(found, key=lambda r: r[0].encode())


def digest(found, covers):
    total = hashlib.sha256()
    for path, kind, shape, data in found:
        if covers(path):
            total.update(f"{path}\t{kind}\t{shape}\t{len(data)}\n".encode() + data)
    return total.hexdigest()


def check(path):
    found = records(path)
    stored = {r[0]: r[3].decode() for r in found if r[0] in ("/@content_sha256", "/@numeric_sha256")}
    content = digest(found, lambda p: p not in stored)
    numeric = digest(found, lambda p: p.startswith("/layers/") or p.startswith("/quantizer@"))
    assert content == stored["/@content_sha256"], f"{path}: content hash {content}"
    assert numeric == stored["/@numeric_sha256"], f"{path}: numeric hash {numeric}"
    return content


def check_additions(path):
    """Where format.md says that 1.1 keeps what it added."""
    with h5py.File(path, "r") as file:
        assert file.attrs["kvq_format_version"] == b"1.1" and file.attrs["kvq_min_reader"] == b"1.1"
        assert file["quantizer"].attrs["recent_tokens"] == 128
        assert file["quantizer"].attrs["threshold_scope"] == b"matrix"
        last = file["layers/002"]
        assert last.attrs["attention_error"] == 2.125 and last["v/heldout"].attrs["clipped_share"] == 1 / 64
        assert last["k"].attrs["datatype"] == b"int-clamped" and last["k"].attrs["domain"] == b"post_rope"
        assert last["v/codebook"].shape == last["v/decode_levels"].shape == (2, 4)
        assert "threshold_lower" not in last["k"] and "threshold_lower" in file["layers/001/k"]
        even = numpy.linspace(-1, 1, 8)[None, :]
        assert numpy.all(abs(last["k/codebook"][()] - even) <= 2.0**-20)


def seal(data):
    return b"kvq-sha256:" + hashlib.sha256(data).hexdigest().encode() + b"\n"


def main():
    kvq = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        path, again = os.path.join(folder, "a.kvq.h5"), os.path.join(folder, "b.kvq.h5")
        subprocess.run([kvq, "--write-sample", path], check=True)
        content = check(path)
        check_additions(path)
        check(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "format-1.0.kvq.h5"))
        with open(path, "rb") as file:
            data = file.read()
        assert data[-76:] == seal(data[:-76]), "the last line is not the hash of what lies before it"
        if shutil.which("h5repack") is None:
            print("skipped: no h5repack; hashes by h5py agree")
            sys.exit(77)
        subprocess.run(["h5repack", "-l", "CHUNK=1x2", "-f", "SHUF", "-f", "GZIP=9", path, again], check=True)
        assert check(again) == content, "the content hash did not survive h5repack"
        with open(again, "rb+") as file:
            file.write(seal(file.read()))
        read = subprocess.run([kvq, "--read", again], stdout=subprocess.PIPE, text=True)
        assert read.stdout.strip() == content, read.stdout
    print("hashes by h5py agree, before and after h5repack")


if __name__ == "__main__":
    main()
