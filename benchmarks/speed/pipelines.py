"""Whole pipelines beside TRL's trainers: SFT, a reward model, PPO, GRPO and DPO of the miniature, from one pretrained policy.

    python benchmarks/speed/pipelines.py FOLDER --peers PEERS --output benchmarks/speed/MACHINE [--rounds 3]

FOLDER keeps the pretrained policy, the data as files, and what every contestant made. Contestants take turns, a whole pipeline
each: the same data in batches of the same sizes, as many steps, the same learning rates, schedules and penalties, float32.
Responses end at EOS, so that batches have the padding that real ones have. A stage's seconds begin when its libraries are
imported, and end with its model saved; JAX's compilation is in the first round's, and its programs are kept for the others.

Whoever is fast must also have learned: afterwards one program, Lockstep on torch, draws responses of the same held-out prompts
from everybody's policies, and the miniature's gold truth scores them. Single trainings differ by luck, so that gold checks
sanity and is no contest.

It writes pipelines.json and pipelines.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from run import Entry, interpreter, machine

HERE = Path(__file__).parent
STAGES = ("sft", "reward", "ppo", "grpo", "dpo")
SETTINGS: dict[str, Any] = {
    "prompt": 28,  # columns at most
    "response": 20,
    "demonstrations": 8000,
    "pairs": 4000,
    "sft": {"batch_size": 16, "learning_rate": 1e-3},
    "reward": {"batch_size": 8, "learning_rate": 5e-4},
    "ppo": {"iterations": 40, "batch_size": 64, "minibatches": 4, "learning_rate": 3e-4, "kl_coef": 0.6},
    "grpo": {"iterations": 40, "batch_size": 8, "samples": 8, "learning_rate": 1e-4, "kl_coef": 0.5},
    "dpo": {"batch_size": 8, "learning_rate": 1e-4, "beta": 0.1},
}
"""Of all contestants. A batch counts demonstrations, pairs or prompts. The demo's, and those of `experiment=methods`."""


def prepare(folder: Path) -> None:
    """The policy that all start from, and the data: pairs are the best and the worst completion of a comparison."""
    if (folder / "prompts.jsonl").exists():
        return
    import lockstep
    from lockstep.learning.rows import dialogues
    from lockstep_miniature.source import Config, Miniature

    without = [f"~stages.{stage}" for stage in ("sft", "reward", "ppo", "ppo_ptx", "evaluate")]
    run = lockstep.run("experiment=demo", "backend=torch", "tracker=none", f"folder={folder / 'start'}", *without)
    run.policy("pretrain").save(folder / "policy")
    source = Miniature(Config(demonstrations=SETTINGS["demonstrations"], comparisons=SETTINGS["pairs"]))

    def asked(prompt: Any) -> list[dict[str, str]]:
        return dialogues([prompt])[0]

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    pairs = []
    for c in source.comparisons("train"):
        best, worst = (c.completions[c.ranks.index(end(c.ranks))] for end in (min, max))
        if best != worst:  # not all of one rank
            pairs.append({"prompt": asked(c.prompt), "chosen": said(best), "rejected": said(worst)})
    rows = {
        "demonstrations": [{"prompt": asked(d.prompt), "completion": said(d.response)} for d in source.demonstrations("train")],
        "pairs": pairs,
        "prompts": [{"prompt": asked(prompt)} for prompt in source.prompts("train")],
    }
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


CONTESTANTS = {
    "lockstep torch": [Entry("torch", "pipelines_lockstep.py", None, {"backend": "torch", "stages": STAGES})],
    "lockstep jax": [Entry("jax", "pipelines_lockstep.py", None, {"backend": "jax", "stages": STAGES})],
    "TRL": [  # the newest, and the last line with PPO
        Entry("TRL 1.16", "pipelines_trl.py", "trl1.16", {"stages": ("sft", "reward", "grpo", "dpo")}),
        Entry("TRL 1.12", "pipelines_trl.py", "trl1.12", {"stages": ("ppo",)}),
    ],
}
"""name: its scripts, one after the other."""


def pipeline(name: str, into: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each stage."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    seconds: dict[str, float] = {}
    for entry in CONTESTANTS[name]:
        python, packages = interpreter(entry, args.peers)
        spec = {"data": str(args.folder), "into": str(into), "settings": SETTINGS, "threads": args.threads, **entry.options}
        own = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [python, HERE / entry.script, json.dumps(spec)]
        with (into / "log.txt").open("a", encoding="utf-8") as log:
            subprocess.run(command, check=True, env={**os.environ, **own, **packages}, stdout=log, stderr=log)
        seconds |= json.loads((into / "seconds.json").read_text(encoding="utf-8"))
    return seconds


def gold(folder: Path, prompts: int = 300) -> float:
    """The mean of a policy's responses to held-out prompts."""
    import lockstep
    from lockstep.learning.rows import dialogues
    from lockstep_miniature.source import Config, Miniature

    source = Miniature(Config())
    asked = list(source.prompts("heldout"))[:prompts]
    policy = lockstep.load(str(folder), "torch")
    answers = policy.respond(dialogues(asked), max_tokens=SETTINGS["response"], seed=1)
    scores = [source.gold(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    return statistics.mean(score["gold"] for score in scores if score is not None)


def report(results: dict[str, Any]) -> str:
    facts, found = results["machine"], results["pipelines"]
    lines = [
        "# Whole pipelines",
        "",
        "Written by `pipelines.py`, which says what is compared. Seconds of a stage are medians over the rounds after the first;",
        "JAX's first round, with compilation, is in brackets. Gold is the mean over rounds, and differs by luck.",
        "",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, {facts['date']}.",
        "",
        "| | " + " | ".join(STAGES) + " | all |",
        "|---|" + "---|" * (len(STAGES) + 1),
    ]
    medians = {}
    for name, rounds in found.items():
        later = rounds[1:] or rounds
        medians[name] = {stage: statistics.median(each["seconds"][stage] for each in later) for stage in STAGES}
        first = {stage: f" ({rounds[0]['seconds'][stage]:.0f})" if name == "lockstep jax" else "" for stage in STAGES}
        total = sum(medians[name].values())
        lines.append(f"| {name} | " + " | ".join(f"{medians[name][s]:.1f}{first[s]}" for s in STAGES) + f" | {total:.0f} |")
    for name in [name for name in found if name != "TRL" and "TRL" in found]:
        ratios = [medians["TRL"][stage] / medians[name][stage] for stage in STAGES]
        total = sum(medians["TRL"].values()) / sum(medians[name].values())
        lines.append(f"| {name}, times as fast as TRL | " + " | ".join(f"{r:.2f}" for r in ratios) + f" | {total:.2f} |")
    for name, rounds in found.items():
        means = {stage: statistics.mean(each["gold"][stage] for each in rounds) for stage in STAGES if stage != "reward"}
        lines.append(f"| {name}, gold | " + " | ".join(f"{means[s]:.2f}" if s in means else "" for s in STAGES) + " | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a folder for this machine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    args = parser.parse_args()
    args.device = "cpu"
    args.folder = args.folder.resolve()
    prepare(args.folder)
    shutil.rmtree(args.folder / "programs", ignore_errors=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    for number in range(args.rounds):
        for name in args.only if number % 2 == 0 else args.only[::-1]:
            into = args.folder / "made" / name.replace(" ", "-") / str(number)
            seconds = pipeline(name, into, args)
            found[name].append({"seconds": seconds, "gold": {s: gold(into / s) for s in STAGES if s != "reward"}})
            print(f"round {number + 1}/{args.rounds}: {name}", json.dumps(found[name][-1]), flush=True)
        results = {"machine": machine(args), "settings": SETTINGS, "pipelines": found}
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "pipelines.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (args.output / "pipelines.md").write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
