"""How the prefill got faster, commit by commit: measures docs/performance.md's steps, and draws them.

    python docs/steps.py measure DIR --save results/h100/steps.jsonl    # what `checkout` left in DIR
    python docs/steps.py checkout DIR                                      # needs git
    python docs/steps.py plot results/h100/steps.jsonl docs/steps.png

Each commit runs in processes of its own, in two passes, there and back; in them the public call is replayed from a CUDA
graph, schedule included, with caches as a running model leaves them: overwritten, then other data read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

# Commit, backend, counts ("padded": to tiles of 128 rows), and what is new.
STEPS = [
    ("a181959", "triton", "padded", "one launch over tiles of 128 rows"),
    ("a181959", "triton", "recorded", "tiles of 16, 32, 64 and 128 rows in it"),
    ("5f9e485", "triton", "recorded", "tiles by expert, blocks of 128 k"),
    ("a558b8b", "triton", "recorded", "one multiply-add a pair of codes"),
    ("ee91975", "triton", "recorded", "matrix instructions follow each other"),
    ("5823f51", "hopper", "recorded", "Gluon: a producer warp, words a block ahead"),
]
PROJECTIONS = ((3072, 1536), (1536, 3072))
SAMPLES, FORMAT, GROUP, EXPERTS = 40, "int4_sym", 128, 256


def checkout(directory: Path) -> None:
    for commit in {step[0] for step in STEPS}:
        target = directory / commit
        target.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", commit, "src"], check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", str(target)], input=archive, check=True)


def sample(backend: str, counts_name: str) -> None:
    """In a process of a commit: prints the samples of both projections as JSON."""
    import torch

    import qexperts
    from qexperts.routing import parse_distribution

    given = torch.tensor(parse_distribution("autoround-256").counts)
    counts = given if counts_name == "recorded" else -(-given // 128) * 128
    device, rows = torch.device("cuda"), int(counts.sum())
    written = torch.empty(2 * 50 * 2**20, dtype=torch.uint8, device=device)
    read = torch.zeros(150 * 2**18, dtype=torch.int32, device=device)
    most = torch.zeros((), dtype=torch.int32, device=device)
    times: dict[str, list[float]] = {}
    for n, k in PROJECTIONS:
        torch.manual_seed(0)
        w = torch.randn(EXPERTS, n, k, device=device, dtype=torch.bfloat16)
        weight = qexperts.prepare(qexperts.quantize(w, FORMAT, group_size=GROUP), backend)
        del w
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        plan = qexperts.TokenPlan.from_counts(counts.to(device, torch.int32), rows)
        y = torch.empty(rows, n, device=device, dtype=torch.bfloat16)

        def call(x=x, weight=weight, plan=plan, y=y) -> None:  # type: ignore[no-untyped-def]
            qexperts.grouped_gemm(x, weight, plan, out=y, backend=backend)

        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        found = []
        for _ in range(SAMPLES):
            written.zero_()
            torch.cuda.synchronize()
            torch.amax(read, dim=0, out=most)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            graph.replay()
            events[1].record()
            torch.cuda.synchronize()
            found.append(events[0].elapsed_time(events[1]))
        times[f"{n}x{k}"] = found
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "samples_ms": times}))


def measure(directory: Path, save: Path) -> None:
    found: dict[int, dict[str, list[float]]] = {}
    machine: dict[str, str] = {}
    for i in [*range(len(STEPS)), *reversed(range(len(STEPS)))]:
        commit, backend, counts, _ = STEPS[i]
        env = os.environ | {"PYTHONPATH": str(directory / commit / "src")}
        command = [sys.executable, __file__, "sample", backend, counts]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
        answer = json.loads(done.stdout.splitlines()[-1])
        for size, times in answer.pop("samples_ms").items():
            found.setdefault(i, {}).setdefault(size, []).extend(times)
        machine = answer
    with save.open("w") as file:
        for i, (commit, backend, counts, what) in enumerate(STEPS):
            for size, times in found[i].items():
                step = {"commit": commit, "backend": backend, "counts": counts, "what": what}
                step |= {"format": FORMAT, "size": size, "median_ms": statistics.median(times), **machine}
                file.write(json.dumps(step | {"samples_ms": times}) + "\n")
                print(f"{step['median_ms']:.3f} ms  N x K {size}  {commit} {what}", flush=True)


def plot(records: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in records.read_text().splitlines()]
    labels = list(dict.fromkeys(row["what"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for j, (n, k) in enumerate(PROJECTIONS):
        times = [row["median_ms"] for row in rows if row["size"] == f"{n}x{k}"]
        places = [i + 0.4 * j - 0.2 for i in range(len(labels))]
        bars = axes.barh(places, times, 0.38, label=f"N={n} K={k}", color=("#4477aa", "#99bbdd")[j])
        axes.bar_label(bars, [f"{t:.3f}" for t in times], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(0.375, color="#aa3333", linestyle="--", linewidth=1)
    axes.annotate("floor", (0.375, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="#aa3333")
    axes.set_xlabel(f"ms, {FORMAT}, recorded workload, {rows[0]['device']}")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("checkout").add_argument("directory", type=Path)
    measuring = commands.add_parser("measure")
    measuring.add_argument("directory", type=Path)
    measuring.add_argument("--save", type=Path, required=True)
    one = commands.add_parser("sample")
    one.add_argument("backend")
    one.add_argument("counts_name")
    drawing = commands.add_parser("plot")
    drawing.add_argument("records", type=Path)
    drawing.add_argument("out", type=Path)
    arguments = vars(parser.parse_args())
    {"checkout": checkout, "measure": measure, "sample": sample, "plot": plot}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
