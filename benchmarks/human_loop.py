"""The human loop with nobody in it: `experiment=rounds labeler=people`, answered through the studio's own HTTP interface.

    python benchmarks/human_loop.py run runs/human seed=0 backend=torch
    python benchmarks/human_loop.py report runs/human --output benchmarks/human

`run` starts the experiment. Whenever it waits for people, it serves the run with `lockstep serve`, has the miniature's six
training labelers join by invitation and label until nothing is left, closes the round as its operator, and continues. A labeler
sees what a person would: the prompt and the answers in the order on the screen. Taste and noise are as in `labeler=miniature`.

`report` holds what the studio measures against what is known of the labelers: the same tasks, labelled again by the same tastes
with other noise, say what agreement and which Bradley-Terry strengths to expect.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from methods import Mean

from lockstep.config.compose import compose
from lockstep.data.labels import CANDIDATES, LABELS, candidates_in
from lockstep.learning import numerics
from lockstep.reporting.compare.reading import read
from lockstep.reporting.compare.records import Run
from lockstep.runs.experiment import run_name
from lockstep.storage.files import read_json, write_json, write_text
from lockstep_miniature.dice import Dice
from lockstep_miniature.labelers import GROUPS, NOISE, TIE, utility
from lockstep_miniature.tasks import Task
from lockstep_miniature.world import World
from lockstep_studio.science import bradley_terry, rankings

LABELERS = GROUPS["training"]
AGAIN = 20
"""Times that the report has all tasks labelled again."""
SETTINGS = """\
judge_alone: false
groups:
  training: {labels: 1, overlap: 2, overlap_share: 0.2, checks_share: 0}
limits: {requests_per_minute: 1000000}
"""


# ------------------------------------------------------------------------------------------------------------ labelers


class Known:
    """What a simulated labeler feels about an answer: its utility needs the truth of the prompt, which the studio never shows."""

    def __init__(self, candidates: Sequence[Any]):
        self.world = World(0)
        self.tasks = {self._key(c.prompt.messages): Task.of(c.prompt) for c in candidates}

    def utilities(self, name: str, messages: Sequence[Any], texts: Sequence[str]) -> list[float]:
        task = self.tasks[self._key(messages)]
        assert task is not None
        return [utility(LABELERS[name], self.world, task, text) for text in texts]

    @staticmethod
    def _key(messages: Sequence[Any]) -> tuple[str, ...]:
        return tuple(m["content"] if isinstance(m, dict) else m.content for m in messages)


class Client:
    """Somebody at the studio, who speaks JSON."""

    def __init__(self, address: str, invitation: str):
        self.client, self.csrf = httpx.Client(base_url=address, headers={"accept": "application/json"}, timeout=60), ""
        self.get(f"/join/{invitation}")
        self.pseudonym = self.post(f"/join/{invitation}").get("pseudonym")

    def get(self, path: str) -> dict[str, Any]:
        return self._read(self.client.get(path))

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        return self._read(self.client.post(path, json={"csrf": self.csrf, **fields}))

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code >= 400:
            raise RuntimeError(f"{response.request.url}: {response.status_code} {response.text[:300]}")
        data: dict[str, Any] = response.json()
        self.csrf = data.get("csrf", self.csrf)
        return data


def work(client: Client, name: str, known: Known, seed: int) -> int:
    """Label until nothing is left; how much that was."""
    client.get("/instructions")
    client.post("/instructions", version="1")
    done = 0
    for mode in ("compare", "rank"):
        while token := (task := client.get(f"/{mode}")).get("lease"):
            texts = [answer["text"] for answer in task["answers"]]
            dice = Dice(seed, f"human/{name}", done)
            felt = [u + NOISE * dice.gumbel() for u in known.utilities(name, task["messages"], texts)]
            ranks = numerics.ranks(felt, TIE)
            if mode == "rank":
                client.post(f"/lease/{token}", ranks=[rank + 1 for rank in ranks], revision=0)
            else:
                client.post(f"/lease/{token}", choice="tie" if len(set(ranks)) == 1 else ranks.index(0), revision=0)
            done += 1
    return done


# ----------------------------------------------------------------------------------------------------------------- run


@contextmanager
def serving(run: Path, studio: Path) -> Iterator[tuple[str, str]]:
    """(address, the operator's invitation)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    studio.mkdir(parents=True, exist_ok=True)
    write_text(studio / "studio.yaml", SETTINGS)
    command = [
        sys.executable, "-m", "lockstep", "serve", str(run), "--folder", str(studio), "--port", str(port),
        "--settings", str(studio / "studio.yaml"), "--operator",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        said = ""
        try:
            for line in server.stdout or ():
                said += line
                if found := re.search(r"/join/(\S+)", said.replace("\n", "")):
                    break
            else:
                raise RuntimeError(f"the studio did not start: {said}")
            address = f"http://127.0.0.1:{port}"
            while True:
                try:
                    httpx.get(address, timeout=5)
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield address, found[1]
        finally:
            server.terminate()


def label(run: Path, stage: Path, studio: Path, seed: int) -> dict[str, Any]:
    known, started = Known(candidates_in(stage / CANDIDATES)), time.perf_counter()
    with serving(run, studio) as (address, invitation):
        operator = Client(address, invitation)
        link = operator.post("/operator/invite", group="training", uses=len(LABELERS), hours=1)["link"]
        clients = {name: Client(address, link.rpartition("/")[2]) for name in LABELERS}
        with ThreadPoolExecutor(len(clients)) as pool:
            counts = list(pool.map(lambda name: work(clients[name], name, known, seed), clients))
        seconds = time.perf_counter() - started
        operator.get("/operator")
        operator.post("/operator/close", name=stage.name)
    if not (stage / LABELS).is_file():
        raise RuntimeError(f"the round was closed, and {stage / LABELS} is not there")
    who = {client.pseudonym: name for name, client in clients.items()}
    return {"labels": sum(counts), "seconds": round(seconds, 1), "who": who}


def run(folder: Path, overrides: Sequence[str]) -> None:
    overrides = ["experiment=rounds", "labeler=people", f"folder={folder}", "tracker=none", *overrides]
    config = compose(overrides)
    name = run_name(config)
    studio, rounds = folder / "studios" / name, dict[str, Any]()
    if (studio / "loop.json").exists():
        rounds = read_json(studio / "loop.json")
    while (code := subprocess.run([sys.executable, "-m", "lockstep", "run", *overrides], check=False).returncode) == 130:
        record = read_json(folder / name / "run.json")
        waiting = [stage for stage in record["stages"].values() if stage["status"] == "waiting"]
        if record["status"] != "waiting" or not waiting:
            sys.exit("stopped")
        stage = folder / waiting[0]["folder"]
        rounds[stage.name] = label(folder / name, stage, studio, config["seed"])
        write_json(studio / "loop.json", rounds)
        print(f"{stage.name}: {rounds[stage.name]['labels']} labels in {rounds[stage.name]['seconds']} s", flush=True)
    sys.exit(code)


# -------------------------------------------------------------------------------------------------------------- report


def rows_of(studio: Path) -> Iterator[tuple[str, list[dict[str, Any]], Mapping[str, str]]]:
    """(stage, comparisons, {pseudonym: labeler}) of each closed round."""
    for stage, facts in read_json(studio / "loop.json").items():
        lines = (studio / "rounds" / stage / "comparisons.jsonl").read_text(encoding="utf-8").splitlines()
        yield stage, [json.loads(line) for line in lines], facts["who"]


def again(rows: Sequence[Mapping[str, Any]], known: Known, who: Mapping[str, str], number: int) -> list[dict[str, Any]]:
    """The same tasks, labelled by the same people another day."""
    found = []
    for i, row in enumerate(rows):
        dice = Dice(number, "human/again", i)
        felt = [u + NOISE * dice.gumbel() for u in known.utilities(who[row["labeler"]], row["messages"], row["completions"])]
        ranks = numerics.ranks(felt, TIE)
        if row["mode"] == "compare":
            ranks = tuple(int(rank > 0) for rank in ranks)
        found.append({**row, "ranks": list(ranks)})
    return found


def science(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{what: Interval}: agreement of labelers, and the strength of each policy."""
    agreement = rankings.by_group(rows, draws=500)["training"]
    found = {"agreement": agreement["raw"], "alpha": agreement["alpha"]}
    if games := list(bradley_terry.games(rows)):  # in the first round all answers are by one policy
        reference = next(name for game in games for name in (game.first, game.second) if name.startswith("sft"))
        fitted = bradley_terry.fit(games, reference, ("side",))
        found |= {name.partition("-")[0]: each for name, each in fitted.strengths(clustered=True).items() if name != reference}
        found["side"] = fitted.effects(clustered=True)["side"]
    return found


POLICIES = ("sft", "ppo_1", "ppo_2", "ppo_3")


def gained(folder: Path) -> list[str]:
    """A table: gold and its gain in each round, over the seeds of each backend."""
    found: dict[str, list[Run]] = {}
    for run in read([folder]).runs:
        if run.status == "done":
            found.setdefault(str(run.backend["name"]), []).append(run)
    head = ("backend", "seeds", "policy", "gold", "gain over the round before", "rose", "ability", "KL to SFT, nats")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for backend, runs in sorted(found.items(), reverse=True):
        for policy in POLICIES:
            cells = []
            for metric in ("gold", "gain", "ability", "kl"):
                known = [r.evaluation.splits["heldout"][policy].get(metric) for r in runs]
                cells.append(Mean.of([each.mean for each in known if each is not None]) if all(known) else None)
            gold, gain, ability, kl = cells
            rose = gain.positive if gain else ""
            lines.append(f"| {backend} | {len(runs)} | `{policy}` | {gold} | {gain or ''} | {rose} | {ability} | {kl} |")
    return lines


def report(folder: Path, output: Path) -> None:
    lines = [
        "| run | round | labels | measure | measured | expected from their tastes | inside |",
        "|---|---|---|---|---|---|---|",
    ]
    inside = []
    for studio in sorted(each for each in (folder / "studios").iterdir() if (each / "loop.json").exists()):
        for stage, rows, who in rows_of(studio):
            known = Known(candidates_in(folder / "stages" / stage / CANDIDATES))
            measured = science(rows)
            others = [science(again(rows, known, who, number)) for number in range(AGAIN)]
            for what, found in measured.items():
                expected = 0.0 if what == "side" else float(np.mean([other[what].value for other in others]))
                inside.append(found.low <= expected <= found.high)
                lines.append(
                    f"| {studio.name} | {stage.partition('-')[0]} | {len(rows)} | {what} | {found.value:.3f} "
                    f"[{found.low:.3f}, {found.high:.3f}] | {expected:.3f} | {'yes' if inside[-1] else 'no'} |"
                )
    output.mkdir(parents=True, exist_ok=True)
    table = gained(folder)
    write_text(output / "rounds.md", "\n".join(table) + "\n")
    print("\n".join(table))
    lines += ["", f"{sum(inside)} of {len(inside)} intervals of 95% have the expected value inside."]
    write_text(output / "science.md", "\n".join(lines) + "\n")
    print(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("do", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/human"))
    arguments, overrides = parser.parse_known_args()
    if arguments.do == "run":
        run(arguments.folder, overrides)
    else:
        report(arguments.folder, arguments.output)


if __name__ == "__main__":
    main()
