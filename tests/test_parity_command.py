"""`lockstep parity`: what it reports of two backends that agree, and of ones that do not."""

import contextlib
import csv
import json
import sys

import numpy as np
import pytest

import conftest
from lockstep.checking.parity import parity, print_summary
from lockstep.checking.parity.differences import Step, compare_crossings, distance
from lockstep.checking.parity.march import March, split
from lockstep.checking.tap import EvaluateCall, GenerateCall, UpdateCall
from lockstep.cli import main
from lockstep.errors import ConfigError, Stopped
from lockstep.interfaces import Generated, Term
from lockstep.learning import randomness
from lockstep.text.sequences import pack
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss
from runs import DECODER, PPO_ONLY, TINY

SMALL = [*TINY, *DECODER, "torch.threads=1", "jax.compilation_cache=null"]
SFT_ONLY = [*SMALL, "~stages.reward", "~stages.ppo", *PPO_ONLY, "~stages.pretrain", "stages.sft.policy=new"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The whole pipeline, free running."""
    pytest.importorskip("torch"), pytest.importorskip("jax")
    return parity([*SMALL, *PPO_ONLY], output=tmp_path_factory.mktemp("parity"))


def test_the_backends_stay_together_through_a_whole_pipeline(report):
    assert [stage.name for stage in report.stages] == ["pretrain", "sft", "reward", "ppo"]
    for stage in report.stages:
        assert len(stage.steps) == stage.total
        last = stage.steps[-1]
        if stage.name == "reward":  # no ranking says where a scale begins: docs/parity.md
            assert last.parameters_at == "reward_model.score.bias" and last.measures["parameters_l2"] < 1e-3
        else:
            assert last.measures["parameters"] < 1e-4, stage.name
        assert not [note for step in stage.steps for note in step.notes]
        assert all(step.measures["loss"] < 1e-4 and 0 < step.measures["gradient"] < 1e-3 for step in stage.steps)
    ppo = report.stages[-1].steps
    assert len(ppo) == 3 and all(step.tokens == step.tokens_same > 0 and step.first is None for step in ppo)
    assert {"sampler_logprobs", "scores", "logprobs", "values", "batch.advantages"} <= ppo[0].measures.keys()
    assert report.sentences[-1].startswith(f"ppo: all {sum(s.tokens for s in ppo):,} tokens the same; parameters ")


def test_its_files_hold_every_step_and_the_command(report):
    folder = report.files[0].parent
    assert sorted(p.name for p in folder.iterdir()) == ["parity.json", "parity.png", "parity.svg", "report.md", "steps.csv"]
    with open(folder / "steps.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["stage"] == "ppo" and row["step"] != "end"] == ["0", "1", "2"]
    said = (folder / "report.md").read_text()
    assert "    lockstep parity tracker=none" in said and "| ppo | 3 |" in said and "![" in said
    facts = json.loads((folder / "parity.json").read_text())
    assert facts["backends"]["jax"]["precision"] == "float32" and facts["sentences"] == report.sentences


def test_a_lower_precision_is_seen_at_once_and_same_start_keeps_it_from_growing(tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("jax")
    arguments = [*SFT_ONLY, "jax.precision=bfloat16"]
    report = parity(arguments, same_start=True, steps=2, output=tmp_path)
    (stage,) = report.stages
    assert len(stage.steps) == 2
    assert 1e-3 < stage.steps[0].measures["gradient"] < 0.3
    assert report.facts["backends"]["jax"]["precision"] == "bfloat16"
    # One Adam step moves a parameter by at most about the learning rate, so two backends by twice that.
    assert stage.steps[1].measures["parameters"] < 2.1 * 1e-3
    assert "sft: losses at most" in report.sentences[0] and "one step moves the parameters" in report.sentences[0]
    assert "--same-start --steps 2" in report.facts["command"]


def test_one_side_may_have_a_mesh_of_this_process(tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("jax")
    report = parity([*SFT_ONLY, "jax.device=cpu", "jax.mesh.fsdp=4"], steps=2, output=tmp_path)
    assert report.facts["backends"]["jax"]["mesh"] == "fsdp=4" and "mesh" not in report.facts["backends"]["torch"]
    assert report.stages[0].steps[-1].measures["parameters"] < 1e-5


def test_a_mesh_of_several_processes_is_refused():
    """It was left out without a word."""
    pytest.importorskip("torch"), pytest.importorskip("jax")
    with pytest.raises(ConfigError, match=r"the mesh of torch needs 2. Leave out torch.mesh; lockstep check torch compares it"):
        March([*SFT_ONLY, "torch.device=cpu", "torch.mesh.fsdp=2"])


def test_another_learning_rate_on_one_side_is_named_as_what_parts_them(tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("jax")
    march = March(SFT_ONLY, steps=1)
    own = march.sides[1].experiment.stages["sft"].config
    object.__setattr__(own.optimizer, "learning_rate", own.optimizer.learning_rate * 2)
    march.run(_Quiet())
    (step,) = march.stages[0].steps
    assert step.measures["gradient"] < 1e-5 and step.measures["loss"] < 1e-5
    assert step.measures["parameters"] > 1e-5 and step.parameters_at.startswith("policy.")


def test_a_hugging_face_model_is_compared_like_any_other(folders, tokenizer, tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("jax"), pytest.importorskip("transformers")
    tokenizer.save(folders[0])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": conftest.sentence(i, 3)}) + "\n" for i in range(24)))
    arguments = [
        "tracker=none", "torch.threads=1", "jax.compilation_cache=null", "policy=huggingface", f"policy.path={folders[0]}",
        "data=files", f"data.prompts=[{{path: {prompts}}}]", "reward_model=function",
        "reward_model.function=reward_functions:shortness", "algorithm.value_network=shared", "algorithm.batch_size=8",
        "algorithm.epochs=1", "algorithm.lengths={prompt: 8, response: 6, multiple: 8}", "~stages.pretrain", "~stages.sft",
        "~stages.reward", *PPO_ONLY, "stages.ppo.policy=new",
    ]  # fmt: skip
    report = parity(arguments, same_start=True, steps=2, output=tmp_path / "out")
    (stage,) = report.stages
    assert all(step.tokens == step.tokens_same > 0 for step in stage.steps)
    assert stage.steps[-1].measures["parameters"] < 1e-5


class _Quiet:
    def progress(self, *_):
        return contextlib.nullcontext(lambda *_: None)


# ------------------------------------------------------------------------------------------------------------ the measures


class _Model:
    vocab_size = 37


def generation(tokens, logprobs, mask, *, temperature=1.0):
    shape = np.asarray(tokens).shape
    seeds = randomness.token_seeds(0, "test", 0, *shape)
    generated = Generated(np.asarray(tokens), np.asarray(mask, bool), np.asarray(logprobs, np.float32))
    prompts = np.ones((shape[0], 2), np.int64)
    return GenerateCall(_Model(), prompts, prompts.astype(bool), seeds, temperature, generated)


def test_the_first_differing_token_is_of_the_earliest_column_then_row():
    mask = [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    one = generation([[1, 2, 3], [4, 5, 6], [7, 8, 36]], np.full((3, 3), -1.0), mask)
    other = generation([[1, 2, 9], [4, 9, 6], [7, 9, 30]], np.full((3, 3), -1.5), mask)
    step = Step("ppo", 0)
    compare_crossings(step, ("a", "b"), [one], [other])
    assert (step.tokens, step.tokens_same) == (8, 5)
    assert (step.first.row, step.first.column, step.first.tokens) == (1, 1, (5, 9))
    noise = randomness.hash_gumbel(one.seeds[1, 1], 37)
    assert step.first.tie == pytest.approx(abs(-1.0 + noise[5] - (-1.5 + noise[9])), abs=1e-6)


def test_log_probabilities_are_compared_only_where_rows_are_the_same():
    mask = [[1, 1], [1, 0]]
    one = generation([[1, 2], [3, 36]], [[-1.0, -2.0], [-3.0, 0.0]], mask)
    other = generation([[1, 9], [3, 36]], [[-5.0, -6.0], [-3.25, 77.0]], mask)
    step = Step("ppo", 0)
    compare_crossings(step, ("a", "b"), [one], [other])
    assert step.measures["sampler_logprobs"] == 0.25


def test_not_a_number_on_one_side_is_infinitely_far_and_on_both_is_agreement():
    rows = pack([[1]], [[2, 3]], 36, prompt_columns=1, response_columns=2)
    make = lambda values: EvaluateCall(_Model(), rows, 1.0, {"values": np.array([[0.0, *values]], np.float32)})  # noqa: E731
    for one, other, expected in [
        ([np.nan, 1], [np.nan, 1.5], 0.5),
        ([np.nan, 1], [0, 1], np.inf),
        ([np.inf, 1], [np.inf, 1], 0),
    ]:
        step = Step("ppo", 0)
        compare_crossings(step, ("a", "b"), [make(one)], [make(other)])
        assert step.measures["values"] == expected


def test_an_array_of_prompts_is_compared_where_all_rows_of_a_prompt_are_the_same():
    """DPO's pairs [N, K, K] beside its rows [N K, T]."""
    tokens = [[[2], [3], [4], [5]], [[2], [3], [4], [9]]]  # the second prompt's last row differs
    blocks = [pack([[1]] * 4, rows, 36, prompt_columns=1, response_columns=1) for rows in tokens]
    pairs = np.zeros((2, 2, 2), np.float32)
    for changed, expected in (((0, 0, 1), 0.5), ((1, 0, 1), 0.0)):
        other = pairs.copy()
        other[changed] = 0.5
        arrays = zip(blocks, ({"pairs": pairs, "one": np.zeros(3)}, {"pairs": other, "one": np.zeros(3)}), strict=True)
        calls = [UpdateCall([Term(NextTokenLoss(), rows, batch)], 1.0, None, {"loss": 0.0}) for rows, batch in arrays]
        step = Step("ppo", 0)
        compare_crossings(step, ("a", "b"), *([call] for call in calls))
        assert step.measures["batch.pairs"] == expected and "batch.one" not in step.measures


def test_crossings_that_are_no_pair_end_the_comparison_and_say_so():
    one = generation([[1]], [[-1.0]], [[1]])
    step = Step("ppo", 0)
    compare_crossings(step, ("torch", "jax"), [one], [])
    assert step.notes == ["crossing 0 is GenerateCall on torch and nothing on jax: nothing after it is compared"]


def test_distance_is_the_largest_difference_its_place_and_the_relative_length():
    step = Step("ppo", 0)
    found = distance(step, {"a": np.array([3.0, 0.0]), "b": np.array([4.0])}, {"a": np.array([3.0, 0.5]), "b": np.array([4.0])})
    assert found == (0.5, pytest.approx(0.1), "a")
    assert distance(step, {"a": np.zeros(1), "c": np.zeros(1)}, {"a": np.zeros(1)})[0] == 0
    assert step.notes == ["only one of the two has c"]


# -------------------------------------------------------------------------------------------------------- the command line


def test_an_override_for_one_backend_reaches_it_alone():
    names, (first, second) = split(["backend=torch,jax", "torch.threads=1", "jax.device=cpu", "seed=3", "~torch.device"])
    assert names == ("torch", "jax")
    assert first == ["backend=torch", "backend.threads=1", "seed=3", "~backend.device"]
    assert second == ["backend=jax", "backend.device=cpu", "seed=3"]


@pytest.mark.parametrize(
    ("value", "says"), [("torch", "names one"), ("torch,torch", "names twice the same"), ("torch,jax,numpy", "names 3")]
)
def test_two_different_backends_are_needed(value, says):
    with pytest.raises(ConfigError, match=rf"{says}.*Type backend=FIRST,SECOND"):
        split([f"backend={value}"])


def test_no_step_is_no_comparison():
    with pytest.raises(ConfigError, match="--steps 0 compares nothing. Give at least 1"):
        March(SFT_ONLY, steps=0)


def test_what_was_measured_before_ctrl_c_is_written(tmp_path, monkeypatch):
    pytest.importorskip("torch"), pytest.importorskip("jax")
    from lockstep.checking.parity import march

    original = march.compare_parameters

    def interrupt(step, *learners):
        original(step, *learners)
        if step.number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(march, "compare_parameters", interrupt)
    report = parity(SFT_ONLY, output=tmp_path)
    assert report.stopped == "stopped in sft after 1 of its steps"
    assert "**Stopped in sft after 1 of its steps.**" in (tmp_path / "report.md").read_text()
    with pytest.raises(Stopped, match="The report covers everything until then"):
        print_summary(report)


def test_the_command_prints_the_table_and_where_the_files_are(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch"), pytest.importorskip("jax")
    monkeypatch.setattr(sys, "argv", ["lockstep", "parity", *SFT_ONLY, "--steps", "1", "--output", str(tmp_path)])
    main()
    said = capsys.readouterr().out
    assert "torch and jax, free running" in said and "1 of" in said and "report.md" in said
