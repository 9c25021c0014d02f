"""`lockstep evaluate`: what the harness asks of a policy, and where results go. The numbers are those of lm_eval's own model
``hf`` on the same policy (benchmarks/outsiders/lm_eval_hf.py), so most of this needs no lm_eval."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from lockstep.checking.conformance import world
from lockstep.commands import evaluate
from lockstep.commands.evaluate.requests import Asked, Continuation
from lockstep.errors import CheckpointError, ConfigError, DataError
from lockstep.reporting.compare import groups, page, reading, tables, tidy
from lockstep.storage.files import read_json
from lockstep.text.sequences import width
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import TokenizerConfig
from run_folders import write_run

HF = json.loads((Path(__file__).parent / "fixtures" / "outsiders" / "lm_eval_hf.json").read_text())


def silent(done: int) -> None:
    """Tells nobody."""


@pytest.fixture
def asked(load, tokenizer) -> Asked:
    return Asked(load(0), tokenizer.pad_id, batch=5)


# -------------------------------------------------------------------------------------------------------- the arithmetic


def test_log_likelihoods_and_greedy_flags_are_those_of_hf(asked):
    requests = [Continuation(row["context"], row["ids"]) for row in HF["choices"]]
    found = asked.loglikelihoods(requests, silent)
    np.testing.assert_allclose([total for total, _ in found], [row["logprob"] for row in HF["choices"]], atol=1e-5)
    assert [greedy for _, greedy in found] == [row["greedy"] for row in HF["choices"]]
    assert 10 < sum(greedy for _, greedy in found) < len(found) - 10


def test_responses_are_those_of_hf(asked, tokenizer):
    (until,), (limit,) = {tuple(row["until"]) for row in HF["responses"]}, {row["limit"] for row in HF["responses"]}
    contexts = [row["context"] for row in HF["responses"]]
    texts = asked.continuations(contexts, Stops(tokenizer, until), limit, 0.0, 0, silent)
    assert texts == [row["text"] for row in HF["responses"]]


def test_an_answer_depends_neither_on_the_batch_nor_on_the_other_requests(asked, tokenizer):
    requests = [Continuation(row["context"], row["ids"]) for row in HF["choices"][:9]]
    alone = [asked.logprob_sums([request], silent)[0] for request in requests]
    np.testing.assert_allclose(asked.logprob_sums(requests, silent), alone, atol=1e-5)
    contexts, stops = [row["context"] for row in HF["responses"][:7]], Stops(tokenizer)
    sampled = asked.continuations(contexts, stops, 6, 1.0, 0, silent)
    assert sampled == Asked(asked.policy, asked.pad_id, batch=2).continuations(contexts, stops, 6, 1.0, 0, silent)
    assert sampled != asked.continuations(contexts, stops, 6, 1.0, 1, silent)


def test_a_context_that_is_too_long_loses_its_oldest_tokens(asked):
    ids, limit = [i % 34 for i in range(100)], asked.policy.context_length
    long, fitting = Continuation(ids, [5, 6]), Continuation(ids[-(limit - 2) :], [5, 6])
    assert asked.logprob_sums([long], silent) == asked.logprob_sums([fitting], silent)
    with pytest.raises(DataError, match=r"A continuation has 64 tokens, and the policy's context holds 64"):
        asked.logprob_sums([Continuation([1], ids[:64])], silent)
    with pytest.raises(DataError, match=r"A task asks for 64 new tokens, and the policy's context holds 64"):
        asked.continuations([[1]], Stops(world.tokenizer()), 64, 0.0, 0, silent)


def test_an_empty_continuation_is_certain(asked):
    assert asked.loglikelihoods([Continuation([1, 2], [])], silent) == [(0.0, True)]


def test_widths_are_few_and_waste_less_than_a_third():
    widths = {length: width(length, 8) for length in range(1, 5000)}
    assert [widths[n] for n in (1, 8, 9, 12, 13, 16, 17, 24, 25, 4097)] == [8, 8, 12, 12, 16, 16, 24, 24, 32, 6144]
    assert all(length <= padded and (length < 8 or 3 * (padded - length) < padded) for length, padded in widths.items())


# ------------------------------------------------------------------------------------------------------------ the records


def row(**changes):
    how = {"shots": 0, "limit": None, "chat": False}
    return {"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.05, "n": 100, **how, **changes}


def test_results_are_kept_beside_the_policy_and_the_same_evaluation_replaces_itself(tmp_path):
    file = tmp_path / "tasks.json"
    evaluate.keep(file, [row(), row(metric="acc_norm")])
    evaluate.keep(file, [row(value=0.6), row(shots=5)])
    kept = read_json(file)["results"]
    assert [(r["metric"], r["shots"], r["value"]) for r in kept] == [("acc", 0, 0.6), ("acc_norm", 0, 0.5), ("acc", 5, 0.5)]
    file.write_text('{"results": [{"task": 3}]}')
    with pytest.raises(CheckpointError, match=r"tasks.json is not what `lockstep evaluate` found: results\[0\].task is 3"):
        evaluate.keep(file, [row()])


def test_compare_shows_each_policys_value_with_its_standard_error(tmp_path):
    for seed, value in ((0, 0.5), (1, 0.7)):
        run = write_run(tmp_path, "torch", seed)
        stages = read_json(run / "run.json")["stages"]
        evaluate.keep(tmp_path / stages["sft"]["folder"] / "tasks.json", [row(value=value), row(shots=5, limit=10, chat=True)])
        unknown = [row(value=0.25, stderr=None), row(metric="f1", value=None)]
        evaluate.keep(tmp_path / stages["ppo"]["folder"] / "tasks.json", unknown)
    one = tables.tasks(groups.group(reading.read([tmp_path / "demo-torch-0"])))
    assert one.rows == [
        ["arc acc", ""], ["sft", "0.5000 ± 0.0500"], ["ppo", "0.2500"],
        ["arc acc (5-shot, first 10, chat)", ""], ["sft", "0.5000 ± 0.0500"],
    ]  # fmt: skip
    both = groups.group(reading.read([tmp_path]))
    table = tables.all_tables(both, [], [])["tasks"]
    # by hand: the variance between seeds is 0.02, the mean squared error 0.0025; sqrt(0.02 / 2 + 0.0025) = 0.1118
    assert table.rows[1] == ["sft", "0.6000 ± 0.1118"]
    assert "0.6000 ± 0.1118" in page.render(both, "", "", [], {"tasks": table}, {})
    assert [r[-3][0] for r in tidy.series(both) if r[7] == "tasks/arc acc"] == [0.5, 0.25, 0.7, 0.25]


def test_every_policy_of_a_run_is_evaluated(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    with pytest.raises(CheckpointError, match=r"has no policy yet. Finish it first"):
        evaluate.policies(str(run), None)
    for name, stage in read_json(run / "run.json")["stages"].items():
        made = {"kind": stage["produces"], "policy": "decoder"}
        (tmp_path / stage["folder"] / "output" / "output.json").write_text(json.dumps(made))
        assert evaluate.stage_folder(str(run), name) == tmp_path / stage["folder"] if stage["produces"] == "policy" else True
    assert list(evaluate.policies(str(run), None)) == ["pretrain", "sft", "ppo", "ppo_ptx"]
    assert evaluate.policies(str(run), "sft") == {"sft": (str(run), "sft")}
    assert evaluate.stage_folder(str(tmp_path / "models" / "public"), None) is None


# ---------------------------------------------------------------------------------------------------- with lm_eval itself


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(given)


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    with pytest.raises(ConfigError, match=r"needs lm_eval, which is not installed. Type: pip install 'lockstep-rlhf\[harness\]'"):
        evaluate.run(arguments("runs/x", "--tasks", "arc_easy"), [])


@pytest.fixture
def tasks(tmp_path):
    """A folder with a multiple-choice, a perplexity and a generation task on local files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = [[world.sentence(50 + i + k, 1 + k) for k in range(3)] for i in range(4)]
    rows = [{"question": world.sentence(i, 3 + i), "choices": each} for i, each in enumerate(choices)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    local = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test",
        "doc_to_text": "{{question}}", "doc_to_target": 0, "metadata": {"version": 1},
    }  # fmt: skip
    kinds = {
        "mine_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]},
        "mine_texts": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "mine_responses": {
            "output_type": "generate_until", "generation_kwargs": {"until": ["w3"], "max_gen_toks": 6},
            "doc_to_target": "{{question}}", "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, task in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **local, **task}))
    return folder


def test_local_tasks_are_run_on_both_backends(tasks, tmp_path, backend, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    world.write_checkpoint(tmp_path, 0)
    spaced = "{% for m in messages %}{{ m.content }} {% endfor %}"
    world.tokenizer().replaced(TokenizerConfig(None, None, None, spaced)).save(tmp_path)
    given = ["--include", str(tasks), "--backend", backend.name, "--output", str(tmp_path / "found.json"), "--batch", "3"]
    names = "mine_choice,mine_texts,mine_responses"
    evaluate.run(arguments(str(tmp_path), "--tasks", names, "--limit", "3", "--chat", *given), [])
    (rows,) = read_json(tmp_path / "found.json")["policies"].values()
    assert [(r["task"], r["n"], r["chat"]) for r in rows] == [
        ("mine_choice", 3, True), ("mine_texts", 3, True), ("mine_responses", 3, True),
    ]  # fmt: skip
    assert all(math.isfinite(r["value"]) for r in rows)
    assert "bits_per_byte" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"No task named 'mine_choise'. Did you mean 'mine_choice'\?"):
        evaluate.run(arguments(str(tmp_path), "--tasks", "mine_choise", *given), [])
