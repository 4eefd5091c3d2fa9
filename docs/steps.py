"""Draws docs/steps.png, the steps of docs/performance.md, from records: python docs/steps.py"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from qexperts.bench.records import load_records  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STEPS = [  # provider, commit, and what it is
    ("humming", "ee91975", "peer: Humming 0.1.19"),
    ("fused", "a181959", "four classes of tiles in one launch"),
    ("fused", "22c02a7", "blocks of 128 k, tiles by expert,\none multiply-add a pair of codes"),
    ("fused", "ee91975", "matrix instructions follow each other"),
    ("hopper", "5823f51", "Gluon: a producer warp,\nwords a block ahead"),
    ("hopper", "c18154f", "results from registers, no spills,\na class of 96 rows"),
]
SIZES = ((3072, 1536, "#33669a"), (1536, 3072, "#93b7d9"))


def main() -> None:
    records = load_records(ROOT / "results/h100/prefill_steps.jsonl")
    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for j, (n, k, color) in enumerate(SIZES):
        found = {(r.provider, r.commit): r.median_ms for r in records if r.n == n}
        times = [found[provider, commit] for provider, commit, _ in STEPS]
        bars = axes.barh(
            [i + 0.38 * j - 0.19 for i in range(len(STEPS))], times, 0.36, label=f"N={n} K={k}", color=color
        )
        axes.bar_label(bars, [f"{time:.3f}" for time in times], padding=3, fontsize=8)
    axes.axvline(0.375, color="#aa3333", linestyle="--", linewidth=1)
    axes.annotate(
        "floor 0.375", (0.375, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="#aa3333"
    )
    axes.set_yticks(range(len(STEPS)), [text for *_, text in STEPS])
    axes.invert_yaxis()
    axes.set_xlim(0, 0.95)
    axes.set_xlabel("ms, int4_sym, recorded workload, one H100, CUDA graph")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs/steps.png", dpi=150)


if __name__ == "__main__":
    main()
