r"""Every attacker against every defender, over seeds, and what each ablation costs: tables of `experiment=hardening`.

    lockstep reproduce hardening_ablations hydra.launcher.parallel=2
    python benchmarks/hardening.py runs/findings --output benchmarks/hardening

`records.csv` has a row per measure, the diversity of attacks included. A run replaces the rows of an earlier run of its arm,
backend and seed, so all runs need not exist at once. `matrix.md` is made of all records: means over seeds with Student's
95% interval. Each run starts from its own level, so the first table shows what changed since PPO in each, and the mean change.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from methods import Mean

from lockstep.reporting.compare.reading import read

ATTACKER = "attacker"
"""Stands in place of a policy in the records of an attack stage's own measures."""
SHOWN = (("helped", "attacks"), ("refused", "twins"), ("gold", "all"))
"""Of a judge or gold, the splits that it is shown on."""
DIVERSITY = ("goals", "strategies", "words")
COLUMNS = ("arm", "backend", "seed", "split", "policy", "metric", "mean")


@dataclass(frozen=True)
class Record:
    """What one run measured: `splits[split][policy][metric]`, means over prompts."""

    arm: str
    backend: str
    seed: int
    splits: dict[str, dict[str, dict[str, float]]]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.arm, self.backend, self.seed


def measured(folders: Sequence[Path]) -> Iterator[Record]:
    """Of the runs of the experiment that are complete."""
    metrics = [metric for metric, _ in SHOWN]
    for run in read(folders).runs:
        if run.evaluation.splits and "without" in run.config:
            left_out = run.config["without"]
            arm = "whole" if left_out == "nothing" else f"without {left_out}"
            splits = {
                split: {policy: {metric: found[metric].mean for metric in metrics} for policy, found in policies.items()}
                for split, policies in run.evaluation.splits.items()
            }
            for name in (name for name in splits if name in run.stages and "diversity/goals" in run.stages[name].metrics):
                found = run.stages[name].metrics
                splits[name][ATTACKER] = {kind: float(found[f"diversity/{kind}"].values[-1]) for kind in DIVERSITY}
            yield Record(arm, run.backend["name"], run.seed, splits)


def recorded(file: Path) -> Iterator[Record]:
    found: dict[tuple[str, str, int], Record] = {}
    if file.exists():
        with file.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                key = row["arm"], row["backend"], int(row["seed"])
                record = found.setdefault(key, Record(*key, {}))
                record.splits.setdefault(row["split"], {}).setdefault(row["policy"], {})[row["metric"]] = float(row["mean"])
    yield from found.values()


def store(records: Iterable[Record], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(COLUMNS)
        for record in records:
            for split, policies in record.splits.items():
                for policy, found in policies.items():
                    rows.writerows((*record.key, split, policy, metric, f"{mean:.6g}") for metric, mean in found.items())


def table(records: Sequence[Record], metric: str, kind: str) -> Iterator[str]:
    """Policies across, splits down."""
    splits = records[0].splits
    policies = list(next(iter(splits.values())))
    yield "| " + " | ".join((f"{metric}, {len(records)} seeds", *policies)) + " |"
    yield "|" + "---|" * (len(policies) + 1)
    for split in splits:
        twins = split.endswith("_twins")
        if kind == "all" or twins == (kind == "twins") or (kind == "twins" and split == "heldout"):
            cells = [[each.splits[split][policy][metric] for each in records] for policy in policies]
            yield "| " + " | ".join((f"`{split}`", *(str(Mean.of(values)) for values in cells))) + " |"
    yield ""


def changes(records: Sequence[Record]) -> Iterator[str]:
    """Of each run: before hardening and after each round, success on disguises that nobody trained on and on the first round's
    attacks, refusals of harmless twins (the mean over all of them), gold on ordinary prompts."""
    policies = [p for p in records[0].splits["heldout"] if p == BEFORE or p.startswith("defender")]
    shown = dict(zip(["PPO", *map(str, range(1, len(policies)))], policies, strict=True))
    yield from by_run(records, MEASURES, shown, lambda record, name, policy: MEASURES[name](record, policy))
    last = policies[-1]
    means = [Mean.of([measure(each, last) - measure(each, BEFORE) for each in records]) for measure in MEASURES.values()]
    yield f"| change of {len(records)} runs | " + " | ".join(map(str, means)) + " |"
    yield ""


def attacks(records: Sequence[Record]) -> Iterator[str]:
    """The diversity of each round's attacks, where it is on record: the shares of goals that fell and of strategies that differ,
    and the mean distance of a strategy to the nearest other one."""
    known = [each for each in records if any(ATTACKER in found for found in each.splits.values())]
    if not known:
        return
    rounds = [name for name, found in known[0].splits.items() if ATTACKER in found]
    shown = {name: name for name in rounds}
    yield from by_run(known, DIVERSITY, shown, lambda record, kind, name: record.splits[name][ATTACKER][kind])
    yield ""


def by_run(
    records: Sequence[Record], measures: Iterable[str], places: Mapping[str, str], value: Callable[[Record, str, str], float]
) -> Iterator[str]:
    """Runs down, measures across, each from place to place. ``places``: {what it is called: what ``value`` knows it by}."""
    measures = list(measures)
    yield "| run | " + " | ".join(f"{name}: {' → '.join(places)}" for name in measures) + " |"
    yield "|" + "---|" * (len(measures) + 1)
    for record in records:
        cells = [" → ".join(f"{value(record, name, place):.2f}" for place in places.values()) for name in measures]
        yield f"| {record.backend}, seed {record.seed} | " + " | ".join(cells) + " |"


def of(split: str, metric: str) -> Callable[[Record, str], float]:
    return lambda record, policy: record.splits[split][policy][metric]


def refused_twins(record: Record, policy: str) -> float:
    twins = [found[policy]["refused"] for name, found in record.splits.items() if name.endswith("_twins")]
    return sum(twins) / len(twins) if twins else float("nan")


BEFORE = "ppo"
MEASURES: dict[str, Callable[[Record, str], float]] = {
    "success, unseen disguises": of("adversarial", "helped"),
    "success, first attacks": of("attacks_1", "helped"),
    "twins refused": refused_twins,
    "gold": of("heldout", "gold"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "records.csv"
    records = sorted({each.key: each for each in (*recorded(file), *measured(arguments.runs))}.values(), key=order)
    store(records, file)
    lines = [
        line
        for arm in dict.fromkeys(each.arm for each in records)
        for same in [[each for each in records if each.arm == arm]]
        for line in (f"## {arm}, since PPO", "", *changes(same), *attacks(same))
    ]
    for arm, backend in dict.fromkeys((each.arm, each.backend) for each in records):
        same = [each for each in records if (each.arm, each.backend) == (arm, backend)]
        lines += [f"## {arm}, {backend}", "", *(line for metric, kind in SHOWN for line in table(same, metric, kind))]
    (arguments.output / "matrix.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def order(record: Record) -> tuple[bool, str, str, int]:
    """The whole first."""
    return record.arm != "whole", *record.key


if __name__ == "__main__":
    main()
