"""The table of claims: every finding on each backend, and what the backend changes, from the recorded outcomes.

    lockstep reproduce NAME hydra.launcher.parallel=2
    cp runs/findings/pages/NAME-.../{page.md,page.png,outcomes.csv} benchmarks/findings/NAME/
    python benchmarks/findings.py benchmarks/findings

It writes README.md into the folder. A folder in a finding's, such as instructgpt/bfloat16, has the outcomes of the same seeds
under another setting. A finding's claims and criteria are those of `conf/finding/NAME.yaml` as it is now; the page
of each says when they were written down.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.reporting.findings.finding import ClaimConfig, Finding, finding, findings
from lockstep.reporting.findings.outcomes import Outcome, as_claimed, between_backends, judged
from lockstep.reporting.markdown import escaped

Outcomes = Mapping[tuple[str, str], Outcome]
"""By claim and backend."""


@dataclass(frozen=True)
class Record:
    """``treated``: outcomes under other settings, by the name of their folder."""

    name: str
    finding: Finding
    outcomes: Outcomes
    treated: Mapping[str, Outcomes]


def recorded(folder: Path) -> Iterator[Record]:
    for name in findings():
        if (file := folder / name / "outcomes.csv").exists():
            found, _ = finding(name)
            treated = {other.parent.name: outcomes_of(other, found) for other in sorted(file.parent.glob("*/outcomes.csv"))}
            yield Record(name, found, outcomes_of(file, found), treated)


def outcomes_of(file: Path, found: Finding) -> Outcomes:
    values: dict[tuple[str, str], dict[int, float]] = {}
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            values.setdefault((row["claim"], row["backend"]), {})[int(row["seed"])] = float(row["value"])
    most = max(map(len, values.values()))
    return {key: judged(key[0], found.claims[key[0]], key[1], seeds, most) for key, seeds in values.items()}


def table(records: Sequence[Record]) -> str:
    backends = list(dict.fromkeys(backend for record in records for _, backend in record.outcomes))
    counts = {record.name: Counter(verdicts(record, claim, backends) for claim in record.finding.claims) for record in records}
    in_all = Counter[str]()
    for count in counts.values():
        in_all.update(count)
    some = sum(count[ALL] > 0 for count in counts.values())
    lines = [
        "# What was found",
        "",
        "Written by `python benchmarks/findings.py benchmarks/findings`. [docs/findings.md](../../docs/findings.md) says how a",
        "claim is judged. Means over seeds with Student's 95% interval, and how many seeds are as claimed; each is in a world of",
        f"its own. {in_all[ALL]} of {in_all.total()} claims, of {some} of the {len(records)} findings, held on"
        f" {' and on '.join(backends)}; nothing is corrected for their number.",
        "",
        f"| finding | claims | {' | '.join(VERDICTS)} |",
        "|---|" + "---|" * (1 + len(VERDICTS)),
        *(
            f"| {name} | {count.total()} | {' | '.join(str(count[each]) for each in VERDICTS)} |"
            for name, count in counts.items()
        ),
    ]
    for record in records:
        f = record.finding
        apart = {
            each.name: each.found.interval + ", **apart**" * each.apart for each in between_backends([*record.outcomes.values()])
        }
        lines += [
            "",
            f"## {escaped(f.title)}",
            "",
            f"{escaped(f.source)}. [The page]({record.name}/page.md); `lockstep reproduce {record.name}`.",
            "",
            f"| claim | published | criterion | {' | '.join(backends)} | {' − '.join(backends)} |",
            "|---|---|---|" + "---|" * (len(backends) + 1),
        ]
        for name, claim in f.claims.items():
            texts = [escaped(text) for text in (claim.claim, claim.published, claim.criterion)]
            cells = [cell(claim, record.outcomes.get((name, backend))) for backend in backends]
            lines.append(f"| {' | '.join([*texts, *cells, apart.get(name, '')])} |")
        for treatment, outcomes in record.treated.items():
            lines += differences(record, treatment, outcomes, backends)
    return "\n".join(lines) + "\n"


ALL = "held on all backends"
VERDICTS = (ALL, "held on one", "not held on any", "not decided")


def verdicts(record: Record, claim: str, backends: Sequence[str]) -> str:
    """Which of `VERDICTS` the outcomes of a claim come to."""
    found = [record.outcomes[claim, backend].verdict if (claim, backend) in record.outcomes else "" for backend in backends]
    if "held" in found:
        return ALL if set(found) == {"held"} else VERDICTS[1]
    return VERDICTS[2] if set(found) == {"not held"} else VERDICTS[3]


def differences(record: Record, treatment: str, outcomes: Outcomes, backends: Sequence[str]) -> list[str]:
    """A table of what the setting changes, seed by seed."""
    lines = [
        "",
        f"The same seeds with {treatment}: its value minus the one above, and its verdict where that is another.",
        "",
        f"| claim | {' | '.join(backends)} |",
        "|---|" + "---|" * len(backends),
    ]
    for name, claim in record.finding.claims.items():
        cells = []
        for backend in backends:
            a, b = outcomes.get((name, backend)), record.outcomes.get((name, backend))
            (each,) = between_backends([a, b]) if a and b else (None,)
            verdict = f": {a.verdict}" if a and b and a.verdict != b.verdict else ""
            cells.append("" if each is None else each.found.interval + ", **apart**" * each.apart + verdict)
        lines.append(f"| {' | '.join([escaped(claim.claim), *cells])} |")
    return lines


def cell(claim: ClaimConfig, outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    verdict = "**held**" if outcome.verdict == "held" else outcome.verdict
    return f"{outcome.found.interval}, {as_claimed(claim, outcome.found)}: {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "README.md").write_text(table(list(recorded(folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
