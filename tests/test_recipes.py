"""The recipes of conf/experiment, by a dry run against local files with the columns of the public data sets."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from listings import ROOT
from lockstep.commands import run as run_command
from lockstep.commands.run.dry_run import FIRST, _check_lengths
from lockstep.config.compose import compose
from lockstep.data import files
from lockstep.errors import CheckpointError, ConfigError, DataError, LockstepError, RewardError
from lockstep.models.architecture import from_hf, initial_parameters, small_decoder, to_hf
from lockstep.runs.experiment import Experiment
from lockstep.runs.store import RunFolder
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import read_tensors, write_tensors
from lockstep.text.encoding import Lengths
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Prompt
from runs import TINY, tiny

# Columns and types as the data sets' own pages list them.


def hh(i):
    start = f"\n\nHuman: Question {i}?\n\nAssistant:"
    return {"chosen": f"{start} A good answer.", "rejected": f"{start} A bad answer."}


def tldr(i):
    return {"id": f"t3_{i}", "subreddit": "tifu", "title": f"Title {i}", "post": "It was long ago.", "summary": f"Long ago, {i}."}


def summarize_from_feedback(i):
    info = {
        "id": f"t3_{i}",
        "post": "It was long ago.",
        "title": f"Title {i}",
        "subreddit": "tifu",
        "site": None,
        "article": None,
    }
    summaries = [{"text": f" {text}", "policy": "sup4_ppo_rm4", "note": None} for text in ("Long ago.", "What?")]
    extra = {"confidence": None}
    return {
        "info": info,
        "summaries": summaries,
        "choice": i % 2,
        "worker": "w1",
        "batch": "batch3",
        "split": "train",
        "extra": extra,
    }


def ultrafeedback(i):
    aspect = {"Rating": "4", "Rationale": "Because."}
    annotations = {name: aspect for name in ("instruction_following", "honesty", "truthfulness", "helpfulness")}
    models = ["alpaca-7b", "gpt-4", "llama-2-13b-chat", "ultralm-13b"]
    completions = [
        {
            "model": model, "principle": "helpfulness", "custom_system_prompt": "Be helpful.", "annotations": annotations,
            "response": f"Answer {k}.", "critique": "Good.", "overall_score": score, "fine-grained_score": 4.0,
        }
        for k, (model, score) in enumerate(zip(models, [7.5, 9.0, 6.0, 2.0], strict=True))
    ]  # fmt: skip
    given = {"correct_answers": ["None"], "incorrect_answers": ["None"]}
    return {"source": "evol_instruct", "instruction": f"Question {i}?", "models": models, "completions": completions, **given}


def ultrafeedback_binarized(i):
    chosen, rejected = (
        [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": text}] for text in ("Good.", "Bad.")
    )
    row = {"prompt": f"Question {i}?", "prompt_id": "ab12", "chosen": chosen, "rejected": rejected, "messages": chosen}
    return {**row, "score_chosen": 8.0, "score_rejected": 5.0}


def messages(i):
    """ultrachat_200k and no_robots."""
    turns = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Good."}]
    return {"prompt": f"Question {i}?", "prompt_id": "ab12", "messages": turns, "category": "Open QA"}


def wikitext(i):
    return {"text": f" An article, line {i} . \n" if i % 3 else ""}


@pytest.fixture
def write(tmp_path):
    """write(layout): a folder of data with the splits of the public one, by its path; 40 rows each."""

    def write(layout, splits=("train",)):
        folder = tmp_path / layout.__name__
        folder.mkdir()
        for number, split in enumerate(splits):
            rows = (layout(100 * number + i) for i in range(40))
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return write


WORDS = ["a", "[UNK]", "<eos>", "A", "good", "bad", "Good", "Bad", "Long", "ago", "What", *map(str, range(4))]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}


@pytest.fixture
def policy(tmp_path):
    """A checkpoint with a tokenizer. Of its weights, a dry run reads the header only."""
    architecture = small_decoder(
        vocab_size=len(VOCABULARY),
        hidden_size=4,
        layers=1,
        heads=1,
        kv_heads=1,
        intermediate_size=4,
        context_length=2048,
        rope_theta=1e4,
        tied=True,
    )
    write_json(tmp_path / "policy" / "config.json", to_hf(architecture))
    write_tensors(tmp_path / "policy" / "model.safetensors", initial_parameters(architecture, 0))
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    Tokenizer(core, eos_token="<eos>", pad_token="[PAD]", chat_template="{{ messages[0].content }}").save(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def dry(tmp_path, policy, capsys, monkeypatch):
    """dry(experiment, override, ...): what a dry run prints, in a folder that it must leave as it is."""
    monkeypatch.chdir(tmp_path)

    def dry(*arguments):
        before = sorted(tmp_path.rglob("*"))
        run_command.run(None, ["--dry-run", f"policy.path={policy}", "policy.tokenizer.path=null", *arguments])
        assert sorted(tmp_path.rglob("*")) == before
        return " ".join(capsys.readouterr().out.split())

    return dry


def source(path, **keys):
    return "[{" + ", ".join(f"{key}: {value}" for key, value in {"path": path, **keys}.items()) + "}]"


def test_hh(dry, write):
    out = dry("experiment=hh", f"data.comparisons={source(write(hh))}", "data.heldout_fraction=0.25")
    assert "40 comparisons in" in out and "2.0 completions and 1.0 pairs per prompt" in out
    assert "200 iterations x 64 episodes = 12800 episodes" in out and "Everything a dry run can check is correct." in out


def test_rl(dry, tmp_path):
    rows = [{"prompt": f"w{n} + 1", "answer": n + 1} for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = f"data.prompts={source(tmp_path / 'sums.jsonl', columns='[answer]')}"
    out = dry("experiment=rl", prompts)
    assert "200 iterations x 16 prompts x 8 responses" in out and "Everything a dry run can check is correct." in out
    with pytest.raises(RewardError, match="needs the column 'answer'"):
        dry("experiment=rl", prompts.replace("answer", ""))


def test_tldr(dry, write):
    splits = ("train", "validation")
    paths = {"demonstrations": write(tldr, splits), "comparisons": write(summarize_from_feedback, splits)}
    out = dry("experiment=tldr", *(f"data.{noun}={source(path)}" for noun, path in paths.items()))
    assert "tokens and begins 'SUBREDDIT: r/tifu\\n\\nTITLE: Title 0\\n\\nPOST" in out
    assert "data.heldout_comparisons[0]: 40 heldout_comparisons" in out
    assert "1953 iterations x 512 episodes = 999936 episodes over 40 prompts; 4 epochs x 1 minibatches of 512" in out
    assert "Everything a dry run can check is correct." in out


@pytest.mark.parametrize(
    "layout, pairs", [(ultrafeedback, "4.0 completions and 6.0 pairs"), (ultrafeedback_binarized, "1.0 pairs")]
)
def test_ultrafeedback(dry, write, layout, pairs):
    demonstrations = source(write(messages, ["train_sft"]), split="train_sft")
    comparisons = source(write(layout))
    paths = [f"data.demonstrations={demonstrations}", f"data.comparisons={comparisons}"]
    with pytest.raises(DataError, match="The heldout split of data.prompts is empty"):  # 2% of 40, which the evaluation reads
        dry("experiment=ultrafeedback", *paths)
    out = dry("experiment=ultrafeedback", *paths, "data.heldout_fraction=0.25")
    assert pairs in out and "1 epochs x 8 minibatches of 64" in out and "Everything a dry run can check is correct." in out


def test_instructgpts_own_numbers(dry, write):
    paths = {"demonstrations": messages, "comparisons": ultrafeedback, "texts": wikitext}
    out = dry(
        "experiment=instructgpt_paper",
        *(f"data.{noun}={source(write(layout))}" for noun, layout in paths.items()),
        "data.heldout_fraction=0.25",
    )
    assert "data.texts[0]: 26 of 40 rows" in out and "left out: 14 with an empty text" in out
    assert "x 16 epochs / 32 per step" in out and "x 2 epochs / 29 and 3 raw texts per step" in out
    assert "500 iterations x 512 episodes = 256000 episodes" in out and "+ 512 raw texts each" in out  # 8 x 64


def test_the_ensemble(capsys):
    run_command.run(None, ["--dry-run", "experiment=ensemble", "data.texts=60", "data.demonstrations=60", "data.comparisons=40"])
    assert "reward_2 would run" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------------------------------- what a dry run finds out


def test_wrong_columns_are_told_with_the_known_ones(dry, write):
    with pytest.raises(DataError, match="no comparisons can be made from the columns category, messages, prompt, prompt_id"):
        dry("experiment=hh", f"data.comparisons={source(write(messages))}")


def test_a_checkpoint_that_does_not_fit_its_tokenizer_or_its_configuration_is_told(dry, write, policy):
    config, data = read_json(policy / "config.json"), f"data.comparisons={source(write(hh))}"
    write_json(policy / "config.json", config | {"vocab_size": 2})
    with pytest.raises(CheckpointError, match=r"do not fit .*: model.embed_tokens.weight is \(15, 4\), not \(2, 4\)"):
        dry("experiment=hh", data)
    write_tensors(policy / "model.safetensors", initial_parameters(from_hf(read_json(policy / "config.json")), 0))
    with pytest.raises(ConfigError, match=r"does not fit the policy 'new': .* of 2 rows: '<eos>' \(2\)"):
        dry("experiment=hh", data)


def test_a_public_reward_model_that_does_not_fit_is_told(dry, write, policy, tmp_path):
    public, data = shutil.copytree(policy, tmp_path / "public"), f"data.comparisons={source(write(hh))}"
    choose = (f"reward_model.source={public}", "~stages.reward", data)
    weights = read_tensors(public / "model.safetensors")
    write_tensors(public / "model.safetensors", weights | {"score.weight": np.ones((1, 5), np.float32)})
    with pytest.raises(CheckpointError, match=r"do not fit its config.json: score.weight is \(1, 5\), not \(1, 4\)"):
        dry("experiment=hh", *choose)
    write_json(public / "config.json", read_json(public / "config.json") | {"vocab_size": 2})
    weights = initial_parameters(from_hf(read_json(public / "config.json")), 0) | {"score.weight": np.ones((1, 4), np.float32)}
    write_tensors(public / "model.safetensors", weights)
    with pytest.raises(ConfigError, match=r"does not fit the reward model '.*public': .* of 2 rows: '<eos>' \(2\)"):
        dry("experiment=hh", *choose)


def test_a_tokenizer_that_pads_with_eos_is_told(dry, write):
    with pytest.raises(ConfigError, match="pads with '<eos>', which is also its EOS"):
        dry("experiment=hh", f"data.comparisons={source(write(hh))}", "policy.tokenizer.pad_token='<eos>'")


def test_a_policy_that_is_not_there_is_told(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match="There is no folder models/smollm3, and it is not a hub id"):
        run_command.run(
            None, ["--dry-run", "experiment=hh", "policy.path=models/smollm3", f"data.comparisons={source(write(hh))}"]
        )


def test_the_hub_is_asked_for_the_first_rows_only(dry, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, **how):
        asked.append((path, how["data_dir"], how["streaming"]))
        return iter(hh(i) for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = dry("experiment=hh")
    assert set(asked) == {("Anthropic/hh-rlhf", "helpful-base", True), ("Anthropic/hh-rlhf", "harmless-base", True)}
    assert f"{files.FIRST} comparisons in Anthropic/hh-rlhf/helpful-base" in out


def test_without_a_network_it_says_what_is_not_checked(dry, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lockstep.storage.hub._answers", lambda minute: True)
    out = dry("experiment=hh", "policy.path=someone/some-model")
    assert "it could not be loaded from the Hugging Face hub: no network. A local path works too" in out
    assert "tokenizer: there is no folder someone/some-model, so it is taken as a Hugging Face hub id" in out
    assert (
        "Not checked: data.demonstrations[0]," in out
        and "policy, tokenizer, stages.sft, stages.reward, stages.ppo, stages.evaluate." in out
    )


# ------------------------------------------------------------------------------- what the run would find out, only later


def small(tmp_path, *overrides):
    """A dry run of the miniature's pipeline."""
    run_command.run(None, ["--dry-run", *TINY, f"folder={tmp_path}", *overrides])


HOURS_LATER = {
    "reward_model.function='no_such_module:reward' cannot be imported": [
        "reward_model=function", "reward_model.function=no_such_module:reward"],
    "The environment variable NO_SUCH_TOKEN is not set.": [
        "reward_model=endpoint", "reward_model.url=http://127.0.0.1:1/score", "reward_model.token_variable=NO_SUCH_TOKEN"],
    "The miniature has no split 'helduot' of prompts. Did you mean 'heldout'?": ["evaluation.splits=[helduot]"],
}  # fmt: skip


@pytest.mark.parametrize("message", HOURS_LATER)
def test_what_a_late_stage_lacks_is_found_by_a_dry_run_and_before_a_run_trains(tmp_path, monkeypatch, message):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    for start in (lambda *options: small(tmp_path, *options), lambda *options: tiny(tmp_path, *options)):
        with pytest.raises(LockstepError, match=re.escape(message)):
            start(*HOURS_LATER[message])
        assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize("changes", [["algorithm.ptx_coef=1.0"], ["sft.pretrain_mix=0.5"]], ids=str)
def test_raw_texts_that_a_stage_mixes_in_are_missed(dry, write, changes):
    with pytest.raises(DataError, match=re.escape("This run needs texts. Set data.texts='[{path: my.jsonl}]'.")):
        dry("experiment=hh", f"data.comparisons={source(write(hh))}", "data.heldout_fraction=0.25", *changes)


def test_an_evaluation_is_tried_as_far_as_the_tokenizer_goes(tmp_path):
    with pytest.raises(DataError, match="All 12 heldout prompts were dropped: their last prompts alone are longer than 2 tokens"):
        small(tmp_path, "evaluation.lengths.prompt=2")
    for key in ("evaluation", "algorithm"):
        with pytest.raises(ConfigError, match="stop_strings has ''"):
            small(tmp_path, f"{key}.stop_strings=['']")


@pytest.mark.parametrize("stage", ["sft", "reward", "algorithm"])
def test_lengths_that_no_row_fits_are_found(tmp_path, stage):
    nouns = {"sft": "demonstrations", "reward": "comparisons", "algorithm": "prompts"}
    with pytest.raises(DataError, match=rf"All \d+ train {nouns[stage]} were dropped: .* longer than 2 tokens"):
        small(tmp_path, f"{stage}.lengths.prompt=2", "data.prompts=150")


def test_the_rows_that_fit_only_later_count(tmp_path, tokenizer):
    long, short = Prompt.of("w1 w2 w3"), Prompt.of("w1")
    check = lambda *prompts: _check_lengths("prompts", "train", list(prompts), tokenizer, Lengths(2, 4, 1))  # noqa: E731
    check(*[long] * FIRST, short)
    with pytest.raises(DataError, match=f"All {FIRST + 1} train prompts were dropped"):
        check(*[long] * (FIRST + 1))


def test_a_run_of_another_configuration_and_a_place_that_cannot_be_written_are_found(tmp_path):
    RunFolder(tmp_path, "mine").write_config(compose([*TINY, f"folder={tmp_path}", "name=mine"]))
    small(tmp_path, "name=mine")
    with pytest.raises(ConfigError, match="The run 'mine' already exists, with another configuration:\n  seed: 0 -> 1\n"):
        small(tmp_path, "name=mine", "seed=1")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(ConfigError, match=f"folder={folder}: nothing can be written to {tmp_path}/file"):
            small(folder)
        with pytest.raises(ConfigError, match="nothing can be written"):
            tiny(folder)


def test_a_device_that_is_not_here_is_told_and_not_held_against_the_run(tmp_path, capsys):
    small(tmp_path, "backend.device=cuda:99")
    out = " ".join(capsys.readouterr().out.split())
    assert "backend: backend.device='cuda:99' is not usable here" in out and "Not checked: backend." in out
    assert "Only the run itself tells whether weights load" in out


def test_a_folder_that_no_policy_opens_is_found(dry, write, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty was not written by a stage, and no policy for torch opens it"):
        dry("experiment=hh", f"data.comparisons={source(write(hh))}", "data.heldout_fraction=0.25", "stages.sft.policy=empty")


def test_a_sweep_has_no_dry_run():
    with pytest.raises(ConfigError, match="A dry run checks one run, not a sweep. Leave out -m"):
        run_command.run(None, ["--dry-run", "-m", "seed=0,1"])


@pytest.mark.parametrize("name", ["tldr", "ultrafeedback", "instructgpt_paper", "hh", "ensemble"])
def test_every_recipe_is_checked_without_a_file_being_opened(name):
    config = compose([f"experiment={name}", *([] if name in ("tldr", "ensemble") else ["policy.path=owner/model"])])
    try:
        assert list(Experiment(config).stages)[-1] == "evaluate"
    except LockstepError as error:
        pytest.fail(str(error))


def test_a_red_team_of_adapters_runs_to_its_matrix(policy, tmp_path, write, monkeypatch):
    """Two rounds of attacker and defender, adapters on one trunk, on goals from a file."""
    monkeypatch.chdir(tmp_path)
    goals = "".join(f"What {i},Good {i}\n" for i in range(12))
    (tmp_path / "goals.csv").write_text(f"goal,twin\n{goals}")
    run_command.run(
        None,
        [
            "experiment=red_team", "backend=torch", "backend.threads=1", "tracker=none", f"policy.path={policy}",
            "data.goals=[{path: goals.csv}]", f"data.comparisons={source(write(hh))}", "data.heldout_fraction=0.3",
            "lengths={prompt: 24, response: 4, multiple: 4}", "reward.epochs=0.1", "attacking.iterations=1",
            "algorithm.iterations=1", "attack.goals=4", "attack.heldout_goals=2", "attacker.names_goal=false",
            "evaluation.prompts=4", "evaluation.splits=[heldout, seeds, all.attacks]", "evaluation.samples=1",
        ],
    )  # fmt: skip
    (found,) = (tmp_path / "runs/stages").glob("evaluate-*")
    splits = read_json(found / "output" / "evaluation.json")["splits"]
    assert {"heldout", "seeds", "seeds_twins"} <= set(splits)  # what fresh weights write may end before it is an attack
    assert all(set(policies) == {"new", "defender_1", "defender_2"} for policies in splits.values())
    assert {"helped", "refused"} <= set(splits["seeds_twins"]["defender_2"])
    (adapters,) = (tmp_path / "runs/stages").glob("defender_2-*/output/adapter_config.json")
    assert read_json(adapters)["base_model_name_or_path"] == str(policy)


def test_the_experiment_of_the_docs_runs_from_scratch_on_data_of_ones_own(tmp_path):
    section = (ROOT / "docs/recipes.md").read_text(encoding="utf-8").split("\n## From scratch, on data of your own\n")[1]
    conf = tmp_path / "conf" / "experiment"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    rows = [{"prompt": f"What colour is thing {i}?", "chosen": f"Thing {i} is red.", "rejected": "No idea."} for i in range(40)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = re.search(r"^    (lockstep tokenizer .*)$", section, re.MULTILINE)[1]
    small = "algorithm.iterations=1 sft.epochs=1 reward.epochs=1 tracker=none backend.threads=1"
    for command in (tokenizer, f"lockstep run experiment=mine backend=torch {small}"):
        done = subprocess.run(
            [sys.executable, "-m", "lockstep", *shlex.split(command)[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "heldout prompts" in done.stdout
