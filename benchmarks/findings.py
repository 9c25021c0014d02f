"""The table of claims: every finding on each backend, and what the backend changes, from the recorded outcomes.

    lockstep reproduce NAME hydra.launcher.parallel=2
    cp runs/findings/pages/NAME-.../{page.md,page.png,outcomes.csv} benchmarks/findings/NAME/
    python benchmarks/findings.py benchmarks/findings

It writes README.md into the folder. A finding's claims and criteria are those of `conf/finding/NAME.yaml` as it is now; the page
of each says when they were written down.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.reporting.findings.finding import ClaimConfig, Finding, finding, findings
from lockstep.reporting.findings.outcomes import Difference, Mean, Outcome, as_claimed, between_backends, verdict

MARKS = {"held": "**held**", "not held": "not held", "not decided": "undecided"}


@dataclass(frozen=True)
class Record:
    name: str
    finding: Finding
    outcomes: Sequence[Outcome]

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(each.backend for each in self.outcomes))

    def held(self) -> int:
        """Claims that held on every backend."""
        verdicts = {claim: [each.verdict for each in self.outcomes if each.name == claim] for claim in self.finding.claims}
        return sum(set(each) == {"held"} and len(each) == len(self.backends) for each in verdicts.values())


def recorded(folder: Path) -> Iterator[Record]:
    for name in findings():
        file = folder / name / "outcomes.csv"
        if file.exists():
            found, _ = finding(name)
            values: dict[tuple[str, str], dict[int, float]] = {}
            with file.open(encoding="utf-8", newline="") as rows:
                for row in csv.DictReader(rows):
                    values.setdefault((row["claim"], row["backend"]), {})[int(row["seed"])] = float(row["value"])
            most = max(map(len, values.values()))
            outcomes = [
                Outcome(
                    claim,
                    backend,
                    Mean(seeds),
                    verdict(found.claims[claim], Mean(seeds)) if len(seeds) == most else "not decided",
                )
                for (claim, backend), seeds in values.items()
            ]
            yield Record(name, found, outcomes)


def table(records: Sequence[Record]) -> str:
    backends = list(dict.fromkeys(backend for record in records for backend in record.backends))
    claims = sum(len(record.finding.claims) for record in records)
    lines = [
        "# What was found",
        "",
        "Written by `python benchmarks/findings.py benchmarks/findings`. [docs/findings.md](../../docs/findings.md) says how a",
        "claim is judged. Means over seeds with Student's 95% interval, and how many seeds are as claimed; each is in a world of",
        f"its own. {sum(record.held() for record in records)} of {claims} claims held on {' and on '.join(backends)}; nothing is",
        "corrected for their number.",
    ]
    for record in records:
        f, differences = record.finding, between_backends(record.outcomes)
        lines += [
            "",
            f"## {f.title}",
            "",
            f"{f.source}. [The page]({record.name}/page.md); `lockstep reproduce {record.name}`.",
            "",
            f"| claim | published | criterion | {' | '.join(backends)} | {' − '.join(backends)} |",
            "|---|---|---|" + "---|" * (len(backends) + 1),
        ]
        for name, claim in f.claims.items():
            cells = [cell(claim, record.outcomes, name, backend) for backend in backends]
            apart = next((said(each) for each in differences if each.name == name), "")
            lines.append(f"| {claim.claim} | {claim.published} | {claim.criterion} | {' | '.join(cells)} | {apart} |")
    return "\n".join(lines) + "\n"


def cell(claim: ClaimConfig, outcomes: Sequence[Outcome], name: str, backend: str) -> str:
    for each in outcomes:
        if (each.name, each.backend) == (name, backend):
            mean = str(each.found).rpartition(",")[0]
            return f"{mean}, {as_claimed(claim, each.found)}: {MARKS[each.verdict]}"
    return ""


def said(difference: Difference) -> str:
    return f"{difference.found}".rpartition(",")[0] + (", **apart**" if difference.apart else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "README.md").write_text(table(list(recorded(folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
