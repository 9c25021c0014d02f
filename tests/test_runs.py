"""Whole runs, through the same entry as the command line."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

import lockstep
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.errors import CheckpointError, ConfigError
from lockstep.runs import identity
from lockstep.runs.assembly import opener
from lockstep.runs.experiment import Experiment, finished
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import read_weights
from runs import DECODER, PPO_ONLY, TINY, tiny


def lines(run, stage, name="metrics"):
    folder = run.parent / read_json(run / "run.json")["stages"][stage]["folder"]
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def output(run, stage):
    return run.parent / read_json(run / "run.json")["stages"][stage]["folder"] / "output"


def weights(run, stage):
    return read_weights(output(run, stage))


@pytest.fixture(scope="module", params=["torch", "jax"])
def pipeline(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("runs"), f"backend={request.param}")


def test_pipeline_records_every_stage_in_a_folder_that_explains_itself(pipeline):
    record = read_json(pipeline / "run.json")
    assert record["status"] == "done"
    assert list(record["stages"]) == ["pretrain", "sft", "reward", "ppo", "ppo_ptx", "evaluate"]
    assert all(stage["status"] == "done" for stage in record["stages"].values())
    sft = record["stages"]["sft"]["data"]
    assert sft["train demonstrations"] == {
        "total": 60,
        "dropped": 0,
        "shortened": 0,
        "cut": 0,
        "alike": 0,
        "special": 0,
        "unknown": 0,
    }
    assert list(record["stages"]["evaluate"]["data"]) == ["heldout prompts", "adversarial prompts", "ability items"]
    assert (pipeline / "config.yaml").exists()
    assert [row["step"] for row in lines(pipeline, "ppo")] == [0, 1, 2]
    assert {"prompt", "response", "score"} <= lines(pipeline, "ppo", "samples")[0].keys()


def test_pipeline_evaluates_every_policy_with_intervals(pipeline):
    evaluation = read_json(output(pipeline, "evaluate") / "evaluation.json")
    assert list(evaluation["splits"]["heldout"]) == ["pretrain", "sft", "ppo", "ppo_ptx"]
    gold = evaluation["splits"]["heldout"]["ppo"]["gold"]
    assert gold["low"] <= gold["mean"] <= gold["high"] and gold["n"] == 6
    assert evaluation["splits"]["heldout"]["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert evaluation["splits"]["heldout"]["sft"]["win_rate"]["mean"] == 0.5
    assert 0 <= evaluation["reward_model"]["accuracy/gold"]["mean"] <= 1


def test_first_iteration_starts_on_policy_and_on_the_reference(pipeline):
    first = lines(pipeline, "ppo")[0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["policy/approx_kl"] == pytest.approx(0, abs=1e-10)
    assert first["policy/clip_fraction"] == 0
    assert first["policy/loss"] == pytest.approx(0, abs=1e-5)
    assert first["sampler/mismatch_max"] < 1e-4


def test_outputs_open_in_transformers(pipeline):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(output(pipeline, "ppo"))
    tokenizer = AutoTokenizer.from_pretrained(output(pipeline, "ppo"))
    reward_model, info = AutoModelForSequenceClassification.from_pretrained(output(pipeline, "reward"), output_loading_info=True)
    assert tokenizer.vocab_size <= policy.config.vocab_size
    assert reward_model.config.num_labels == 1
    assert not info["missing_keys"]


def test_backends_write_checkpoints_that_the_other_continues(tmp_path, pipeline):
    name = read_json(pipeline / "run.json")["backend"]["name"]
    other = {"torch": "jax", "jax": "torch"}[name]
    source = output(pipeline, "sft")
    stages = ["~stages.pretrain", "~stages.reward", "~stages.ppo", "stages.sft.policy=new"]
    run = tiny(tmp_path, f"backend={other}", *PPO_ONLY, *stages, policy=["policy=huggingface", f"policy.path={source}"])
    assert read_json(run / "run.json")["status"] == "done"


def test_the_same_command_again_trains_nothing(pipeline, capsys):
    record = read_json(pipeline / "run.json")
    before = {p: p.stat().st_mtime_ns for p in pipeline.parent.glob("stages/*/metrics.jsonl")}
    again = tiny(pipeline.parent, f"backend={record['backend']['name']}")
    assert again == pipeline
    assert {p: p.stat().st_mtime_ns for p in pipeline.parent.glob("stages/*/metrics.jsonl")} == before


def test_a_changed_kl_coefficient_shares_the_stages_before_ppo(pipeline):
    name = read_json(pipeline / "run.json")["backend"]["name"]
    changed = tiny(pipeline.parent, f"backend={name}", "algorithm.kl_coef=0.5", "~stages.ppo_ptx", "~stages.evaluate")
    old, new = (read_json(run / "run.json")["stages"] for run in (pipeline, changed))
    assert all(old[stage]["folder"] == new[stage]["folder"] for stage in ("pretrain", "sft", "reward"))
    assert old["ppo"]["folder"] != new["ppo"]["folder"]


def test_the_hh_recipe_runs_on_a_checkpoint_and_a_file_of_whole_dialogues(pipeline, tmp_path):
    name = read_json(pipeline / "run.json")["backend"]["name"]
    answers = [("zib is red .", "no ."), ("it is blue .", "go away ."), ("i am sorry .", "red red red")]
    rows = []
    for i in range(12):
        start = f"\n\nHuman: what colour is zib {'please ' * i}?\n\nAssistant: "
        chosen, rejected = answers[i % 3]
        rows.append({"chosen": start + chosen, "rejected": start + rejected})
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "experiment=hh", f"backend={name}", "tracker=none", f"folder={tmp_path / 'runs'}",
        f"policy.path={output(pipeline, 'sft')}", f"data.comparisons=[{{path: {tmp_path / 'hh.jsonl'}}}]",
        "data.heldout_fraction=0.3", "lengths={prompt: 32, response: 12, multiple: 16}", "sft.batch_size=4",
        "reward.batch_size=4", "algorithm.iterations=2", "algorithm.batch_size=8", "algorithm.minibatches=2",
        "evaluation.prompts=4", "evaluation.batch_size=4",
    ]  # fmt: skip
    run = run_config(compose(overrides), "test")
    evaluation = read_json(output(run, "evaluate") / "evaluation.json")
    assert list(evaluation["splits"]["heldout"]) == ["sft", "ppo"]
    assert "score" in evaluation["splits"]["heldout"]["ppo"] and "gold" not in evaluation["splits"]["heldout"]["ppo"]
    assert 0 <= evaluation["reward_model"]["accuracy/training_labelers"]["mean"] <= 1


# ------------------------------------------------------------------------------------------------------------ options

OPTIONS = [
    ["algorithm.value_network=shared"],
    ["algorithm.kl_target=1.0", "algorithm.kl_horizon=100"],
    ["algorithm.whiten_rewards=true", "algorithm.whiten_advantages=false"],
    ["algorithm.correction.kind=truncate", "algorithm.unfinished_score=null", "algorithm.stop_strings=[is a, the]"],
    ["algorithm.ptx_coef=1.0", "algorithm.micro_batch_size=3"],
    ["algorithm.minibatches=4", "algorithm.epochs=2", "algorithm.gamma=0.99", "algorithm.temperature=0.7"],
    ["algorithm.optimizer.tf_style=true", "algorithm.optimizer.ema_decay=0.992", "algorithm.optimizer.weight_decay=0.1"],
    ["algorithm.schedule={shape: linear, warmup_steps: 1, initial: 0.1, final: 0.0}", "algorithm.optimizer.max_grad_norm=null"],
    ["sft.prompt_loss=true", "sft.pretrain_mix=0.25", "sft.micro_batch_size=5", "sft.dropout=0.2"],
    ["sft.packing=true", "pretrain.packing=true", "sft.pretrain_mix=0.25", "sft.assistant_turns=last"],
    ["reward.normalise=gain_and_bias", "reward.micro_batch_size=3", "reward_model.micro_batch_size=null"],
    ["reward.normalise=none", "reward.schedule.shape=constant"],
    ["backend.precision=bfloat16"],
    ["policy.tied=false", "policy.kv_heads=2"],
    ["reward_model=function", "reward_model.function=reward_functions:shortness", "~stages.reward"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_option_runs_end_to_end(tmp_path, options):
    run = tiny(tmp_path, *PPO_ONLY, *options, "algorithm.iterations=2")
    rows = lines(run, "ppo")
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) and np.isfinite(row["objective/kl"]) for row in rows)


@pytest.mark.parametrize(
    "options",
    [
        ["algorithm.value_network=shared", "algorithm.ptx_coef=1.0", "algorithm.micro_batch_size=4", "algorithm.minibatches=2"],
        ["backend.precision=bfloat16", "policy.tied=false", "algorithm.optimizer.tf_style=true", "sft.prompt_loss=true"],
    ],
    ids=" ".join,
)
def test_options_run_end_to_end_on_jax(tmp_path, options):
    test_every_option_runs_end_to_end(tmp_path, ["backend=jax", *options])


# ----------------------------------------------------------------------------------------------------- what is reused


def folders(folder, *overrides):
    """The stage folders that a run would have, without running it."""
    experiment = Experiment(compose([*TINY, *DECODER, f"folder={folder}", *overrides]))
    return {name: stage.path.name for name, stage in experiment.folders.items()}


def test_a_stage_is_made_anew_when_a_folder_it_reads_has_changed(tmp_path):
    source = tmp_path / "policy"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"one")
    start = [f"stages.sft.policy={source}", "~stages.pretrain", "evaluation.policies=[sft]"]
    before = folders(tmp_path / "runs", *start)
    assert folders(tmp_path / "runs", *start) == before
    (source / "model.safetensors").write_bytes(b"two")
    after = folders(tmp_path / "runs", *start)
    assert before["sft"] != after["sft"] and before["ppo"] != after["ppo"]


def test_a_subclass_of_the_learned_reward_model_depends_on_its_stage_as_that_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("from lockstep_rlhf.reward_models.learned import Learned\nclass Mine(Learned): pass\n")
    for name in ("learned", "mine:Mine"):
        before = folders(tmp_path / "runs", f"reward_model.name={name}")
        after = folders(tmp_path / "runs", f"reward_model.name={name}", "reward.epochs=0.5")
        changed = {stage for stage, folder in before.items() if after[stage] != folder}
        assert changed == {"reward", "ppo", "ppo_ptx", "evaluate"}, name


def test_a_reward_model_gets_only_what_it_has_declared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "careless.py").write_text(
        "from lockstep.interfaces import Inputs\nfrom lockstep_rlhf.reward_models.learned import Learned\n"
        "class Careless(Learned):\n    @classmethod\n    def inputs(cls, config):\n        return Inputs()\n"
    )
    with pytest.raises(ConfigError, match=r"The reward model 'careless:Careless' opens 'reward' without declaring it. Return it"):
        tiny(tmp_path / "runs", *PPO_ONLY, "reward_model.name=careless:Careless")


def test_a_folder_that_no_stage_wrote_is_opened_by_the_policy_that_says_so(tmp_path):
    for name in ("plain", "adapter", "empty"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "plain" / "config.json", {})
    write_json(tmp_path / "adapter" / "adapter_config.json", {})
    assert opener(tmp_path / "plain", "torch") == "huggingface" and opener(tmp_path / "adapter", "torch") == "lora"
    with pytest.raises(CheckpointError, match="was not written by a stage, and no policy for torch opens it"):
        opener(tmp_path / "empty", "torch")


def test_a_stage_is_made_anew_when_its_chat_template_file_has_changed(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    options = [f"policy.tokenizer.chat_template={tmp_path}/chat.jinja"]
    before = folders(tmp_path / "runs", *options)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    assert folders(tmp_path / "runs", *options)["sft"] != before["sft"]


def test_a_stage_is_made_anew_with_another_date_in_its_prompts(tmp_path):
    before, after = (folders(tmp_path / "runs", *options) for options in ([], ["policy.tokenizer.date=2026-01-02"]))
    assert before["sft"] != after["sft"] and before == folders(tmp_path / "runs", "policy.tokenizer.date=null")


def test_a_stage_is_made_anew_when_its_reward_function_has_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_reward.py").write_text("def score(prompts, responses): return [0.0] * len(responses)\n")
    options = ["reward_model=function", "reward_model.function=my_reward:score"]
    before = folders(tmp_path / "runs", *options)
    (tmp_path / "my_reward.py").write_text("def score(prompts, responses): return [1.0] * len(responses)\n")
    after = folders(tmp_path / "runs", *options)
    assert before["sft"] == after["sft"] and before["ppo"] != after["ppo"]


def test_a_stage_is_made_anew_when_a_tool_has_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["experiment=sums", "environment=tools", "environment.functions=[my_tool:search]"]
    found = []
    for answer in ("one", "two"):
        (tmp_path / "my_tool.py").write_text(f"def search(text: str) -> str:\n    'Search.'\n    return {answer!r}\n")
        experiment = Experiment(compose([*options, f"folder={tmp_path / 'runs'}", "tracker=none"]))
        found.append({name: folder.path for name, folder in experiment.folders.items()})
    changed = {name for name in found[0] if found[0][name] != found[1][name]}
    assert changed == {name for name, stage in experiment.stages.items() if stage.environment} != set()


def test_a_run_whose_chat_template_file_has_changed_is_not_done(tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    options = [
        f"policy.tokenizer.chat_template={tmp_path}/chat.jinja",
        f"folder={tmp_path / 'runs'}",
        *[f"~stages.{stage}" for stage in ("sft", "reward", "ppo", "ppo_ptx", "evaluate")],
    ]
    config = compose([*TINY, *DECODER, *options])
    run = run_config(config, "test")
    assert finished(config) == run
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert finished(config) is None


def refuse(cls, config):
    raise ConfigError("does not work here")


@pytest.mark.parametrize("place", ["backend", "data", "policy", "tracker"])
def test_a_component_that_all_stages_share_is_checked_before_the_first(tmp_path, monkeypatch, place):
    experiment = Experiment(compose([*TINY, f"folder={tmp_path}"]))
    monkeypatch.setattr(getattr(experiment, place)[0], "check", classmethod(refuse))
    with pytest.raises(ConfigError, match="does not work here"):
        experiment.check()


@pytest.mark.parametrize("place", ["algorithm", "reward_model"])
def test_a_stages_components_are_checked_before_it_runs(tmp_path, monkeypatch, place):
    stage = Experiment(compose([*TINY, f"folder={tmp_path}"])).stages["ppo"]
    component = stage.component if place == "algorithm" else stage.scorers[0].component
    monkeypatch.setattr(component, "check", classmethod(refuse))
    with pytest.raises(ConfigError, match="does not work here"):
        stage.check()


def test_responses_without_a_score_are_left_out_of_the_evaluation(tmp_path):
    options = ["reward_model=function", "reward_model.function=reward_functions:sometimes", "reward_model.on_failure=drop"]
    run = tiny(tmp_path, "~stages.reward", "~stages.ppo_ptx", "evaluation.texts=0", *options)
    measures = read_json(output(run, "evaluate") / "evaluation.json")["splits"]["heldout"]["ppo"]
    assert np.isfinite(measures["score"]["mean"]) and 0 < measures["score"]["n"] < 6
    assert "text_loss" not in measures


# ---------------------------------------------------------------------------------------------------------- bad input

MISTAKES = {
    "algorithm.batch_size=64 is not divisible by algorithm.minibatches=6. Set minibatches to one of 1, 2, 4, 8": [
        "algorithm.batch_size=64", "algorithm.minibatches=6"],
    "No algorithm named 'pppo' for backend 'torch'. Did you mean 'ppo'?": ["algorithm.name=pppo"],
    "No key 'algorithm.kl_coeff'. Did you mean 'kl_coef'?": ["algorithm.kl_coeff=0.1"],
    "algorithm.kl_coef='high' should be float, not str.": ["algorithm.kl_coef=high"],
    "stages.sft reads the stage 'pretrian', which does not come before it. Did you mean 'pretrain'?": [
        "stages.sft.policy=pretrian"],
    "the key that names it is empty: stages.evaluate.evaluation.baseline.": ["evaluation.baseline=''"],
    "the key that names it is empty: stages.reward.comparisons.": ["+stages.reward.comparisons=[data,'']"],
    "stages.evaluate.evaluation.baseline=['sft'] should be str, not list": [
        "stages.evaluate.evaluation={baseline: [sft]}"],
    "No backend named 'torhc'. Did you mean 'torch'? There are: jax, torch.": ["backend=torhc"],
    "Missing: reward_model.function. Set it on the command line": ["reward_model=function"],
    "stages.ppo needs a reward_model from the stage 'sft', which makes a policy.": ["reward_model.source=sft"],
    "stages.ppo needs a policy from the stage 'reward', which makes a reward_model.": ["stages.ppo.policy=reward"],
    "checkpoint_every=0 must be at least 1.": ["checkpoint_every=0"],
    "seed='abc' should be int, not str.": ["seed=abc"],
    "evaluation.batch_size=0 must be at least 1.": ["evaluation.batch_size=0"],
    "evaluation.best_of needs samples that differ": ["evaluation.best_of=2", "evaluation.temperature=0"],
    "best_of=2 ranks by a reward_model": ["evaluation.best_of=2", "stages.evaluate.reward_model=null"],
    "schedule.shape='cosin' is not one of constant, linear, cosine": ["sft.schedule.shape=cosin"],
    "Unknown key stages.ppo_ptx.changes.ptx_coeff. Did you mean 'ptx_coef'?": ["+stages.ppo_ptx.changes.ptx_coeff=1"],
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES, ids=lambda m: m[:40])
def test_a_mistake_gives_one_clear_error_before_anything_is_written(tmp_path, message):
    with pytest.raises(Exception) as caught:
        Experiment(compose([*TINY, f"folder={tmp_path}", *MISTAKES[message]]))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "stage"),
    [(["policy.context_length=40", "pretrain.lengths.response=32"], "sft"), (["algorithm.lengths.prompt=300"], "ppo"),
     (["evaluation.lengths.prompt=300"], "evaluate")],
)  # fmt: skip
def test_lengths_beyond_the_context_are_refused_before_anything_is_trained(tmp_path, changes, stage):
    with pytest.raises(
        ConfigError, match=rf"stages.{stage}: lengths.prompt \+ lengths.response = .* exceeds the policy's context of"
    ):
        Experiment(compose([*TINY, f"folder={tmp_path}", *changes]))


@pytest.mark.parametrize("policy", ["new", "folder"])
def test_lengths_beyond_the_context_of_a_folder_are_refused_too(tmp_path, policy):
    """The folder is the configured policy's, or the one that a stage starts from."""
    folder = tmp_path / "small"
    lockstep.new_policy("torch", layers=1, hidden_size=32, intermediate_size=32, context_length=64).save(str(folder))
    changes = ["policy=huggingface", f"policy.path={folder}", "~stages.pretrain", "stages.sft.policy=new"]
    changes = changes if policy == "new" else ["~stages.pretrain", f"stages.sft.policy={folder}"]
    with pytest.raises(ConfigError, match=r"stages.sft: lengths.prompt \+ lengths.response = 60 \+ 20 exceeds .* context of 64"):
        Experiment(compose(["tracker=none", f"folder={tmp_path}", "sft.lengths.prompt=60", *changes]))


def test_the_command_line_prints_errors_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "lockstep", "run", *TINY, f"folder={tmp_path}", "algorithm.name=pppo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Did you mean 'ppo'?" in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("backend", "other"), [("torch", "jax"), ("jax", "torch")])
def test_a_run_on_one_backend_never_imports_the_other(tmp_path, backend, other):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from runs import tiny; "
        f"tiny(Path({str(tmp_path)!r}), 'backend={backend}', 'algorithm.iterations=1'); "
        f"assert '{other}' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stages_are_recorded_in_weights_and_biases_offline_and_name_their_inputs(tmp_path, monkeypatch):
    """Read with W&B's own reader."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tiny(tmp_path, *PPO_ONLY, "tracker=wandb", "algorithm.iterations=2", "backend.threads=1")
    stages = read_json(run / "run.json")["stages"]
    for stage, kind, inputs in (
        ("sft", "policy", ["pretrain"]),
        ("reward", "reward_model", ["sft"]),
        ("ppo", "policy", ["sft", "reward"]),
    ):
        (log,) = (run.parent / stages[stage]["folder"]).glob("wandb/offline-run-*/*.wandb")
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        read = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
        records = [json.loads(line) for line in read.splitlines()]
        of = lambda what, records=records: [record[what] for record in records if record["type"] == what]  # noqa: E731
        (config,) = [run["config"]["update"] for run in of("run")]
        assert config["inputs"] == {name: stages[name]["identity"] for name in inputs}
        assert "lockstep-rlhf" in config["code_state"]["plugins"]
        steps = [row["item"]["step"] for row in of("history")]
        assert steps == sorted({row["step"] for row in lines(run, stage)})
        (artifact,) = [a for a in of("artifact") if a["type"] == kind]
        name, _, digest = stages[stage]["identity"].rpartition("-")
        assert artifact["name"] == name and set(artifact["aliases"]) == {digest, "latest"}
        assert json.loads(artifact["metadata"])["inputs"] == config["inputs"]
    assert any("samples.path" in row["item"] for row in of("history"))


def test_comparing_two_runs_writes_the_report(pipeline, tmp_path):
    command = [sys.executable, "-m", "lockstep", "compare", str(pipeline), "--output", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"report.html", "report.md", "report.png", "metrics.csv"} <= {p.name for p in (tmp_path / "report").iterdir()}


def test_code_that_has_changed_since_it_was_imported_is_an_error(tmp_path, monkeypatch):
    """Else what the process still runs would be stored as made by the new code."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "changing_code.py"
    file.write_text("x = 1\n")
    before = identity.code_digests(["changing_code"])
    file.write_text("x = 2\n")
    assert identity.code_digests(["changing_code"]) != before  # not imported: what is on the disk will be
    importlib.import_module("changing_code")
    identity.code_digests(["changing_code"])
    file.write_text("x = 3\n")
    with pytest.raises(ConfigError, match="The code of 'changing_code' has changed since this process began"):
        identity.code_digests(["changing_code"])
