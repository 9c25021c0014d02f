r"""Every attacker against every defender, over seeds, and what each ablation costs: tables of `experiment=hardening`.

    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax hydra.launcher.parallel=2
    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax attack.twins=false hydra.launcher.parallel=2
    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax hydra.launcher.parallel=2 'replay.labelled=[attacks]' \
      'replay.comparisons=[data,labels]' 'replay.prompts=[data,attacks]' 'replay.shares=[0.5,0.5]'
    lockstep run -m experiment=hardening seed=0,1,2,3,4 backend=torch,jax novelty=0 hydra.launcher.parallel=2
    python benchmarks/hardening.py runs/hardening --output benchmarks/hardening

Numbers are means over seeds with Student's 95% interval; a run is one seed.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arms: dict[str, list[Run]] = {}
    for run in read(arguments.runs).runs:
        if run.evaluation.splits:
            arms.setdefault(arm(run), []).append(run)
    lines = [line for name, runs in arms.items() for line in (f"## {name}", "", *of_arm(runs))]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "matrix.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def of_arm(runs: Sequence[Run]) -> list[str]:
    return [line for metric, kind in SHOWN for line in table(runs, metric, kind)]


if __name__ == "__main__":
    main()
