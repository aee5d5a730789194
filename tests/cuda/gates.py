#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What compiled device code must not contain. Usage: gates.py FOLDER_OF_NVCC [SOURCE.cu ...]

Every source is compiled for every architecture; ptxas says what registers, stack and spills a kernel has, and the
disassembly what it executes. Without sources, the suites of tests/device are built as well, as one more gate. Prints a
table, and ends with 1 when a gate fails."""
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDES = ["core", "kernels", "kernels/cuda"]
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v"]

# A kernel of 256 threads has 65536 / 256 registers before a second block no longer fits beside it.
REGISTERS = 128
# What some kernels may do that others may not: beginning of "source:kernel" -> rules, or a ceiling of registers.
ALLOWED = [
    ("loss.cu:", {"double"}),  # log-sum-exp and losses are f64 by definition
    ("row_ops.cu:rmsnorm", {"double"}),  # as is the mean of squares
    ("experts.cu:", {"double"}),  # logits of routers, their softmax and its gradient, dot products of rows
    ("count.cu:", {"double"}),  # weights and their sums are f64 on the host, whose bits these must have
    ("attention_window.cu:statistics", {"double"}),  # and the product of an output and its gradient
    ("attention_window.cu:", 192),  # tiles of scores, of which one block at a time is enough
]
RULES = {
    "sine": re.compile(r"\bMUFU\.(SIN|COS)"),
    "double": re.compile(r"\b(DADD|DMUL|DFMA|DSETP|F2F\.F64\S*|F2F\.F32\.F64|MUFU\.\w*64H)\b"),
    "local memory": re.compile(r"\b(LDL|STL)\b"),
    "floating atomic": re.compile(r"\b(RED|ATOM)[GS]?\.\S*\bF(16|32|64)"),
}


def demangled(name):
    """The identifier inside of a mangled name, with what it was instantiated for."""
    match = re.match(r"_Z(?:N\d+\w*?)?L?(\d+)", name)
    if not match:
        return name
    start, length = match.end(), int(match.group(1))
    instance = re.match(r"I((?:L\w\d+E)+)E", name[start + length:])
    return name[start:start + length] + (f"<{','.join(re.findall(r'L.(.+?)E', instance.group(1)))}>" if instance else "")


def resources(log):
    """name -> (registers, bytes of stack, bytes of spills), from what ptxas says."""
    found, name, stack, spills = {}, None, 0, 0
    for line in log.splitlines():
        if match := re.search(r"(?:Compiling entry function|Function properties for) '?(\w+)", line):
            name, stack, spills = match.group(1), 0, 0
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(match.group(1)), int(match.group(2)) + int(match.group(3))
        if (match := re.search(r"Used (\d+) registers", line)) and name:
            found[name] = (int(match.group(1)), stack, spills)
    return found


def executed(disassembly):
    """name -> its instructions."""
    texts, name = {}, None
    for line in disassembly.splitlines():
        if match := re.match(r"\.section\s+\.text\.(\w+)", line.strip()):
            name = match.group(1)
        if name:
            texts[name] = texts.get(name, "") + line + "\n"
    return texts


def faults(name, used, text):
    """name: source:kernel"""
    registers, stack, spills = used
    granted = [what for begin, what in ALLOWED if name.startswith(begin)]
    allowed = set().union(*(what for what in granted if isinstance(what, set)))
    ceiling = max([REGISTERS] + [what for what in granted if isinstance(what, int)])
    bad = [rule for rule, pattern in RULES.items() if rule not in allowed and pattern.search(text)]
    if spills:
        bad.append(f"{spills} bytes spilled")
    if stack and "local memory" not in allowed:
        bad.append(f"{stack} bytes of stack")
    if registers > ceiling:
        bad.append(f"{registers} registers, {ceiling} allowed")
    return bad


def examine(tools, source, architecture, folder):
    cubin = pathlib.Path(folder) / f"{source.stem}.{architecture}.cubin"
    command = [tools / "nvcc", *FLAGS, f"-arch={architecture}", "-cubin", "-o", cubin, source]
    for path in INCLUDES:
        command += ["-I", ROOT / path]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        return [(source.name, architecture, "", (0, 0, 0), ["does not compile:\n" + built.stdout + built.stderr])]
    sass = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    texts = executed(sass)
    return [(source.name, architecture, demangled(name), used,
             faults(f"{source.name}:{demangled(name)}", used, texts.get(name, "")))
            for name, used in sorted(resources(built.stderr + built.stdout).items())]


def blind(tools, folder):
    """The faults of forbidden.cu that are not found; the kernels say which they have."""
    rows = examine(tools, pathlib.Path(__file__).with_name("forbidden.cu"), "sm_90", folder)
    found = {kernel: " ".join(bad) for _, _, kernel, _, bad in rows}
    wanted = ["sine", "double", "local memory", "floating atomic", "spilled", "registers"]
    return [fault for fault in wanted
            if not any(kernel.startswith("forbidden_" + fault.replace(" ", "_")) and fault in bad
                       for kernel, bad in found.items())]


def device_suites(tools):
    """Whether the suites of device code compile and link for a device (there is none here to run them)."""
    script = ROOT / "tests/device/run.sh"
    return subprocess.run([script, "--build-only"], env={**os.environ, "CUDA_HOME": tools.resolve().parent}).returncode == 0


def main():
    tools = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        if missed := blind(tools, folder):
            sys.exit(f"gates: not found in forbidden.cu: {', '.join(missed)}")
    sources = [pathlib.Path(path) for path in sys.argv[2:]] or sorted((ROOT / "kernels/cuda").glob("*.cu"))
    if not sources:
        sys.exit("gates: there is no CUDA source")
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        work = [pool.submit(examine, tools, source, architecture, folder)
                for source in sources for architecture in ARCHITECTURES]
        rows = [row for job in work for row in job.result()]
    failed = 0
    for source, architecture, kernel, (registers, stack, spills), bad in rows:
        failed += bool(bad)
        print(f"{'FAIL' if bad else 'ok':4}  {architecture}  {registers:3} registers  {source:24} {kernel}"
              + "".join(f"\n      {fault}" for fault in bad))
    n_gates = len(rows)
    if len(sys.argv) == 2:
        sys.stdout.flush()
        n_gates += 1
        failed += not device_suites(tools)
    print(f"cuda gates: {n_gates - failed} passed, {failed} failed, 0 skipped")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
