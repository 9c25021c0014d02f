"""results.json -> results.md and results.png.

python benchmarks/speed/report.py benchmarks/speed/MACHINE
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from worker import SIZES, Work

TITLES = {
    "generate": "Generation",
    "sft": "SFT step",
    "reward": "Reward-model step",
    "ppo": "PPO iteration",
    "grpo": "GRPO iteration",
}
CEILINGS = {"flops": (0, "GFLOP/s in float32"), "flops_bfloat16": (0, "in bfloat16"), "read_bytes": (1, "GB/s read")}
"""Digits and unit of each."""
COLOURS = {"lockstep torch": "#d9542b", "lockstep jax": "#2b7bd9"}


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One per contestant: median, spread, fraction of the ceiling, and the ratio to the peer, round by round."""
    work = Work(**result["work"])
    out: dict[str, dict[str, Any]] = {}
    for ceiling, *others in result["groups"]:
        peers = [c for c in others if not c["name"].startswith("lockstep")]
        peer = next((c for c in peers if c["precision"] == "float32"), next(iter(peers), None))
        for c in others:
            seconds = c["seconds"]
            median = statistics.median(seconds)
            limit = statistics.median(ceiling["flops" if c["precision"] == "float32" else "flops_bfloat16"])
            row = {
                "name": c["name"],
                "seconds": median,
                "low": min(seconds),
                "high": max(seconds),
                "tokens_per_second": work.tokens / median,
                "of_arithmetic": work.flops / median / limit,
                "peak_mib": max(c["peak_mib"]),
            }
            if work.task == "generate":
                row["of_memory"] = work.bytes(c["precision"]) / median / statistics.median(ceiling["read_bytes"])
            if peer is not None and c is not peer:
                row["ratio"] = statistics.median(p / s for p, s in zip(peer["seconds"], seconds, strict=True))
                row["peer"] = peer["name"]
            out.setdefault(c["name"], row)  # a peer that ran beside several is shown as it was beside the first
    return sorted(out.values(), key=lambda row: not row["name"].startswith("lockstep"))


def table(results: dict[str, Any]) -> str:
    lines = []
    for result in results.values():
        work = result["work"]
        ceilings = [group[0] for group in result["groups"]]
        rates = {key: statistics.median(x for c in ceilings for x in c[key]) / 1e9 for key in CEILINGS if key in ceilings[0]}
        measured = ", ".join(f"{rate:.{CEILINGS[key][0]}f} {CEILINGS[key][1]}" for key, rate in rates.items())
        shape = f"{work['rows']} x ({work['prompt']} + {work['response']}) tokens"
        if work["task"] == "ppo":
            shape += f", {work['epochs']} epochs"
        if work["task"] == "grpo":
            shape += f", {work['completions']} responses per prompt"
        lines += [
            f"### {TITLES[work['task']]}, {work['size']}: {shape}",
            "",
            f"{Work(**work).flops / 1e9:.1f} GFLOP. Ceilings measured in the same rounds: {measured}.",
            "",
            "| | seconds (min to max) | tokens/s | of arithmetic | of memory | peak MiB | times as fast as the peer |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows(result):
            memory = f"{row['of_memory']:.0%}" if "of_memory" in row else ""
            own = row["name"].startswith("lockstep")
            ratio = "" if "ratio" not in row else f"**{row['ratio']:.2f}** ({row['peer']})" if own else f"{row['ratio']:.2f}"
            seconds = f"{row['seconds']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            arithmetic = "" if "recommended" in row["name"] else f"{row['of_arithmetic']:.0%}"  # whose shared trunk does less
            lines.append(
                f"| {row['name']} | {seconds} | {row['tokens_per_second']:.0f} "
                f"| {arithmetic} | {memory} | {row['peak_mib']:.0f} | {ratio} |"
            )
        lines.append("")
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Bars of tokens per second, one panel per work; whiskers from the slowest to the fastest round."""
    columns = 3
    count = len(results)
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=(13, 2.6 * -(-count // columns)), squeeze=False)
    for axis, result in zip(axes.flat, results.values(), strict=False):
        work = result["work"]
        found, tokens = rows(result)[::-1], Work(**work).tokens
        values = [row["tokens_per_second"] for row in found]
        whiskers = [
            [v - tokens / row["high"] for v, row in zip(values, found, strict=True)],
            [tokens / row["low"] - v for v, row in zip(values, found, strict=True)],
        ]
        colours = [next((c for n, c in COLOURS.items() if row["name"].startswith(n)), "#999999") for row in found]
        axis.barh([row["name"] for row in found], values, xerr=whiskers, color=colours, error_kw={"lw": 0.8})
        axis.set_title(f"{TITLES[work['task']]}, {work['size']}", fontsize=10)
        axis.set_xlabel("tokens per second", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    order = list(TITLES)
    sizes = list(SIZES)
    results = dict(
        sorted(results.items(), key=lambda kv: (order.index(kv[1]["work"]["task"]), sizes.index(kv[1]["work"]["size"])))
    )
    machines = [json.loads(text) for text in sorted({json.dumps(result["machine"]) for result in results.values()})]
    versions = {
        f"{name} {version}" for r in results.values() for g in r["groups"] for c in g for name, version in c["versions"].items()
    }
    head = [
        "# Speed",
        "",
        "Written by `report.py` from `results.json`. Contestants take turns; seconds are medians over the rounds, the last",
        "column is the median of the rounds' ratios. Work is counted as the algorithm states it, so that anything computed twice",
        "(or at positions nobody reads) lowers the fractions of the ceilings. `../README.md` says what was compared and how.",
        "",
        *(f"Machine: {m['cpu']}, {m['cores']} cores, Python {m['python']}, {m['date']}." for m in machines),
        f"Versions: {', '.join(sorted(versions))}.",
        "",
        "",
    ]
    (folder / "results.md").write_text("\n".join(head) + table(results), encoding="utf-8")
    picture(results, folder / "results.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
