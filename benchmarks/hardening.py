r"""Every attacker against every defender, over seeds, and what each ablation costs: tables of `experiment=hardening`.

    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax hydra.launcher.parallel=2
    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax attack.twins=false hydra.launcher.parallel=2
    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax hydra.launcher.parallel=2 'replay.labelled=[attacks]' \
      'replay.comparisons=[data,labels]' 'replay.prompts=[data,attacks]' 'replay.shares=[0.5,0.5]'
    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax novelty=0 hydra.launcher.parallel=2
    python benchmarks/hardening.py runs/hardening --output benchmarks/hardening

Numbers are means over seeds with Student's 95% interval; a run is one seed. The first table has what changed since PPO, run by
run and over all runs, as each starts from its own level.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from methods import Mean

from lockstep.reporting.compare.reading import read
from lockstep.reporting.compare.records import Run

ABLATIONS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "without twins": lambda config: config.get("attack.twins") is False,
    "without replay": lambda config: "seeds" not in config.get("replay.prompts", ()),
    "without novelty": lambda config: config.get("novelty") == 0,
}
SHOWN = (("helped", "attacks"), ("refused", "twins"), ("gold", "all"))
"""Of a judge or gold, the splits that it is shown on."""


def arm(run: Run) -> str:
    """What the run leaves out, and its backend."""
    left_out = [name for name, has in ABLATIONS.items() if has(dict(run.config))]
    return f"{' and '.join(left_out) or 'whole'}, {run.backend['name']}"


def table(runs: Sequence[Run], metric: str, kind: str) -> Iterator[str]:
    """Policies across, splits down."""
    splits = runs[0].evaluation.splits
    policies = list(next(iter(splits.values())))
    yield "| " + " | ".join((f"{metric}, {len(runs)} seeds", *policies)) + " |"
    yield "|" + "---|" * (len(policies) + 1)
    for split in splits:
        twins = split.endswith("_twins")
        if kind == "all" or twins == (kind == "twins") or (kind == "twins" and split == "heldout"):
            cells = [[run.evaluation.splits[split][policy][metric].mean for run in runs] for policy in policies]
            yield "| " + " | ".join((f"`{split}`", *(str(Mean.of(values)) for values in cells))) + " |"
    yield ""


def changes(runs: Sequence[Run]) -> Iterator[str]:
    """Of each run: before hardening and after each round, success on disguises that nobody trained on and on the first round's
    attacks, refusals of harmless twins (the mean over all of them), gold on ordinary prompts."""
    policies = [p for p in runs[0].evaluation.splits["heldout"] if p == BEFORE or p.startswith("defender")]
    yield (
        "| run | " + " | ".join(f"{name}: {' → '.join(['PPO', *map(str, range(1, len(policies)))])}" for name in MEASURES) + " |"
    )
    yield "|" + "---|" * (len(MEASURES) + 1)
    for run in sorted(runs, key=lambda run: (run.backend["name"], run.seed)):
        cells = [" → ".join(f"{measure(run, p):.2f}" for p in policies) for measure in MEASURES.values()]
        yield f"| {run.backend['name']}, seed {run.seed} | " + " | ".join(cells) + " |"
    last = policies[-1]
    means = [Mean.of([measure(run, last) - measure(run, BEFORE) for run in runs]) for measure in MEASURES.values()]
    yield f"| change of {len(runs)} runs | " + " | ".join(map(str, means)) + " |"
    yield ""


def of(split: str, metric: str) -> Callable[[Run, str], float]:
    return lambda run, policy: run.evaluation.splits[split][policy][metric].mean


def refused_twins(run: Run, policy: str) -> float:
    splits = run.evaluation.splits
    twins = [found[policy]["refused"].mean for name, found in splits.items() if name.endswith("_twins")]
    return sum(twins) / len(twins) if twins else float("nan")


BEFORE = "ppo"
MEASURES: dict[str, Callable[[Run, str], float]] = {
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
    arms: dict[str, list[Run]] = {}
    for run in read(arguments.runs).runs:
        if run.evaluation.splits:
            arms.setdefault(arm(run), []).append(run)
    by_ablation: dict[str, list[Run]] = {}
    for name, runs in arms.items():
        by_ablation.setdefault(name.partition(",")[0], []).extend(runs)
    lines = [line for name, runs in by_ablation.items() for line in (f"## {name}, since PPO", "", *changes(runs))]
    lines += [line for name, runs in arms.items() for line in (f"## {name}", "", *of_arm(runs))]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "matrix.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def of_arm(runs: Sequence[Run]) -> list[str]:
    return [line for metric, kind in SHOWN for line in table(runs, metric, kind)]


if __name__ == "__main__":
    main()
