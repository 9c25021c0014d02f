r"""Whose values a reward model and its policy took on, over seeds: the table of `experiment=values` in docs/rounds.md.

    lockstep run -m experiment=values labeler.groups=[brief],[warm] seed=0,1,2 backend=torch,jax
    python benchmarks/values.py runs/values --output benchmarks/human

What each run measured goes into `values.csv`, in place of what an earlier run of the same backend, seed and labelers left there:
all runs need not be at hand at once. `values.md` is made of all of it. Intervals are Student's t over seeds, 95%. Of two seeds
there is none: it would reach 12.7 standard errors to each side. Seeds 0 and 1 are as published on 2026-11-28, rounded.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from methods import Mean

from lockstep.reporting.compare.reading import read
from lockstep.reporting.compare.records import Run

Row = dict[str, str]
KEY = ("backend", "seed", "labels_by")
MEASURES = {
    "agrees_with_brief": "agrees with `brief`, %", "agrees_with_warm": "with `warm`, %", "agrees_with_gold": "with gold, %",
    "sft_length": "length of SFT, tokens", "ppo_length": "of PPO", "sft_gold": "gold of SFT", "ppo_gold": "of PPO", "kl": "KL",
}  # fmt: skip
LEAST = 2
"""Seeds that are too few for an interval."""
CHANGES = {"longer": "PPO's length less SFT's", "better": "PPO's gold less SFT's"}


def measured(run: Run) -> Row:
    heldout, reward = run.evaluation.splits["heldout"], run.evaluation.reward_model
    (group,) = run.config["labeler.groups"]
    found = {
        "agrees_with_brief": 100 * reward["accuracy/group/brief"].mean,
        "agrees_with_warm": 100 * reward["accuracy/group/warm"].mean,
        "agrees_with_gold": 100 * reward["accuracy/gold"].mean,
        **{f"{policy}_{name}": heldout[policy][name].mean for name in ("length", "gold") for policy in ("sft", "ppo")},
        "kl": heldout["ppo"]["kl"].mean,
    }
    key = dict(zip(KEY, (run.backend["name"], str(run.seed), group), strict=True))
    return key | {name: f"{found[name]:.5g}" for name in MEASURES}


def recorded(file: Path) -> Iterator[Row]:
    if file.exists():
        with file.open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line a backend and community: means over seeds."""
    header = ("backend", "labels by", "seeds", *MEASURES.values(), *CHANGES.values())
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for backend, group in dict.fromkeys((row["backend"], row["labels_by"]) for row in rows):
        same = [row for row in rows if (row["backend"], row["labels_by"]) == (backend, group)]
        of = {name: [float(row[name]) for row in same] for name in MEASURES}
        longer, better = (
            [after - before for after, before in zip(of[f"ppo_{name}"], of[f"sft_{name}"], strict=True)]
            for name in ("length", "gold")
        )
        means = [shown(values) for values in (*of.values(), longer, better)]
        yield "| " + " | ".join((backend, f"`{group}`", str(len(same)), *means)) + " |"


def shown(values: Sequence[float]) -> str:
    mean = Mean.of(values)
    return str(mean) if len(values) > LEAST else f"{mean.mean:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    file = arguments.output / "values.csv"
    found = [measured(run) for run in read(arguments.runs).runs if run.evaluation.splits]
    rows = sorted({tuple(row[k] for k in KEY): row for row in (*recorded(file), *found)}.values(), key=order)
    with file.open("w", encoding="utf-8", newline="") as stream:
        written = csv.DictWriter(stream, (*KEY, *MEASURES), lineterminator="\n")
        written.writeheader()
        written.writerows(rows)
    file.with_suffix(".md").write_text("\n".join(table(rows)) + "\n", encoding="utf-8")


def order(row: Row) -> tuple[bool, str, int]:
    """Torch first, as everywhere."""
    return row["backend"] != "torch", row["labels_by"], int(row["seed"])


if __name__ == "__main__":
    main()
