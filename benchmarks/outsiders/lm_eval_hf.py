"""`lockstep evaluate` against lm_eval's own model ``hf``, which is transformers: log-likelihoods, greedy flags, perplexities,
responses and metrics of the same policy on the same tasks, on each backend.

In an environment with the extras torch, jax and harness, and `accelerate`, which ``hf`` imports:

    python benchmarks/outsiders/lm_eval_hf.py                  # a tiny policy; writes tests/fixtures/outsiders/lm_eval_hf.json
    python benchmarks/outsiders/lm_eval_hf.py models/smollm2   # a public one: benchmarks/smollm2.py; also with its chat template

The tasks are local files: multiple choice with one-token and longer choices, some of them what transformers itself says next;
perplexity of texts of up to several contexts; generation with stop strings. ``hf`` gets a context that is one token shorter, as
Lockstep's is (framework/lockstep/commands/evaluate/harness.py says why).
"""

import json
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lockstep.api.policies import ChatPolicy, load
from lockstep.checking.conformance import world
from lockstep.commands.evaluate.harness import RESAMPLES, LockstepLM, Settings, Tasks
from lockstep.reporting.console import Console

FIXTURE = Path(__file__).parents[2] / "tests/fixtures/outsiders/lm_eval_hf.json"
BACKENDS = {"torch": {"name": "torch", "device": "cpu", "threads": 1}, "jax": {"name": "jax", "device": "cpu"}}
DOCUMENTS, TEXTS = 24, 6
TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "fewshot_split": "test", "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    },
    "texts": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "responses": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
        "fewshot_split": "test", "metric_list": [{"metric": name} for name in ("exact_match", "bleu", "chrf")],
    },
}  # fmt: skip


class Recorded:
    """Keeps what a model answered, by kind of request."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.answers = {}

    def loglikelihood(self, requests, **how):
        return self._kept("choice", requests, super().loglikelihood(requests, **how))

    def loglikelihood_rolling(self, requests, **how):
        return self._kept("texts", requests, super().loglikelihood_rolling(requests, **how))

    def generate_until(self, requests, **how):
        return self._kept("responses", requests, super().generate_until(requests, **how))

    def _kept(self, kind, requests, answers):
        self.answers[kind] = [(list(request.args), answer) for request, answer in zip(requests, answers, strict=True)]
        return answers


class Theirs(Recorded, HFLM):
    pass


class Ours(Recorded, LockstepLM):
    pass


def main(folder: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        raw, saved = Path(temporary) / "raw", Path(temporary) / "saved"
        raw.mkdir()
        policy = folder or load(world.write_checkpoint(raw, 0), BACKENDS["torch"]).save(saved)
        opened = {name: load(policy, backend, pad_token="<|pad|>" if folder else None) for name, backend in BACKENDS.items()}
        theirs = Theirs(pretrained=str(policy), dtype="float32", device="cpu", batch_size=5)
        theirs._max_length = opened["torch"].policy.context_length - 1
        write_tasks(Path(temporary), theirs, topics_of(folder), stops=[" the", "\n"] if folder else ["w3", "w11"])
        for how in (Settings(batch=7), Settings(shots=1, limit=8, batch=7), *([Settings(chat=True, batch=7)] if folder else [])):
            compare(Path(temporary), theirs, opened, how, fixture=not folder and how.shots is None)


def topics_of(folder: Path | None) -> list[list[str]]:
    """Texts as lists of words: Python's own reference, or those that the tiny policy knows."""
    if folder:
        return [topics[name].split(" ") for name in sorted(topics) if len(topics[name]) > 3000][: DOCUMENTS + TEXTS]
    return [world.sentence(i, 400).split() for i in range(DOCUMENTS + TEXTS)]


def write_tasks(folder: Path, model: Theirs, texts: list[list[str]], stops: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows = {"choice": [], "texts": [{"text": " ".join(text[: 20 + 60 * i])} for i, text in enumerate(texts[DOCUMENTS:])]}
    for i, text in enumerate(texts[:DOCUMENTS]):
        question = " ".join(text[: 4 + i])
        asked = Instance("generate_until", {}, (question, {"until": [], "max_gen_toks": 1 + i % 4}), 0)
        (likely,) = HFLM.generate_until(model, [asked], disable_tqdm=True)
        choices = [likely.strip() or text[0], *(" ".join(rng.choice(text, 1 + k)) for k in range(3))]
        rows["choice"].append({"question": question, "choices": choices, "answer": i % 4})
    rows["responses"] = rows["choice"]
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        kwargs = {"generation_kwargs": {"until": stops, "max_gen_toks": 12}} if name == "responses" else {}
        content = {"task": f"local_{name}", **local, **task, **kwargs, "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def compare(folder: Path, theirs: Theirs, opened: dict[str, ChatPolicy], how: Settings, *, fixture: bool) -> None:
    tasks = Tasks([f"local_{name}" for name in TASKS], folder)
    measures = {"hf": measured(tasks, theirs, how)}
    print(f"\n{how}")
    for name, chat in opened.items():
        ours = Ours(chat, how, Console())
        measures[name] = measured(tasks, ours, how)
        print(name, json.dumps(differences(theirs.answers, ours.answers) | metric_differences(measures["hf"], measures[name])))
    print(json.dumps(measures["hf"]))
    if fixture:
        FIXTURE.write_text(json.dumps(as_fixture(theirs)) + "\n", encoding="utf-8")


def measured(tasks: Tasks, model: Recorded, how: Settings) -> dict[str, float]:
    found = evaluator.evaluate(
        lm=model, task_dict=tasks.load(how), limit=how.limit, bootstrap_iters=RESAMPLES, log_samples=False,
        apply_chat_template=how.chat, fewshot_as_multiturn=how.chat,
    )["results"]  # fmt: skip
    return {f"{task} {k}": v for task, row in found.items() for k, v in row.items() if isinstance(v, float)}


def differences(theirs: dict, ours: dict) -> dict[str, float | int]:
    """Largest differences of sums of log-probabilities, per sum; and how many flags and responses differ."""
    pairs = {kind: list(zip(theirs[kind], ours[kind], strict=True)) for kind in TASKS}
    assert all(a[0] == b[0] for found in pairs.values() for a, b in found), "not the same requests"
    for (asked, a), (_, b) in pairs["responses"]:
        if a != b:
            print(f"after {asked[0]!r}: hf {a!r}, here {b!r}")
    return {
        "loglikelihood": max(abs(a[0] - b[0]) for (_, a), (_, b) in pairs["choice"]),
        "rolling": max(abs(a - b) for (_, a), (_, b) in pairs["texts"]),
        "rolling_relative": max(abs(a - b) / abs(a) for (_, a), (_, b) in pairs["texts"]),
        "flags_that_differ": sum(a[1] != b[1] for (_, a), (_, b) in pairs["choice"]),
        "flags": len(pairs["choice"]),
        "greedy": sum(a[1] for (_, a), _ in pairs["choice"]),
        "responses_that_differ": sum(a != b for (_, a), (_, b) in pairs["responses"]),
        "responses": len(pairs["responses"]),
    }


def metric_differences(theirs: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    assert theirs.keys() == ours.keys()
    return {"metrics": len(theirs), "metric_relative": max(abs(theirs[k] - ours[k]) / max(1, abs(theirs[k])) for k in theirs)}


def as_fixture(theirs: Theirs) -> dict:
    """Requests as token ids with ``hf``'s answers, for the tiny policy: tests recompute them without lm_eval."""
    choices = []
    for (context, continuation), (total, greedy) in theirs.answers["choice"]:
        before, ids = theirs._encode_pair(context, continuation)
        choices.append({"context": before, "ids": ids, "logprob": total, "greedy": greedy})
    texts = [{"ids": theirs.tok_encode(text), "logprob": total} for (text,), total in theirs.answers["texts"]]
    responses = [
        {"context": theirs.tok_encode(context), "until": given["until"], "limit": given["max_gen_toks"], "text": text}
        for (context, given), text in theirs.answers["responses"]
    ]
    return {"choices": choices, "texts": texts, "responses": responses}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
