"""What counts as a secret, in every place where one could be written; and what only looks like one."""

from __future__ import annotations

import json
import os
import shlex
import time

import pytest

from lockstep.commands import run as command
from lockstep.commands.cache import stored
from lockstep.commands.run import sweeps
from lockstep.commands.run.sweeps import SweepFolder
from lockstep.config import secrets
from lockstep.config.compose import compose
from lockstep.config.secrets import redact, without_secrets
from lockstep.errors import ConfigError
from lockstep.reporting.console import Console
from lockstep.runs.experiment import Experiment, finished, run_name
from lockstep.runs.runner import Runner
from runs import DECODER, TINY

NAMES = [
    "api_key", "apiKey", "APIKey", "apikey", "OPENAI_API_KEY", "key", "api_keys", "api_key_2", "access_key", "secretKey",
    "private_key", "token", "HF_TOKEN", "auth-token", "authToken", "access_tokens", "reward_token", "password", "db_passwd",
    "client_secret", "secrets", "Authorization", "X-Api-Key", "credentials", "cookie", "passphrase",
]  # fmt: skip
OTHERS = {
    "eos_token": "</s>", "pad_token": "<|pad|>", "stop_token": "END", "bos_token": "x", "image_token": "pic", "good_token": "ки",
    "add_bos_token": True, "use_auth_token": True, "max_new_tokens": 5, "max_tokens": 5, "tokens_per_second": 2.0, "token": None,
    "tokenizer": "gpt2", "prompt_key": "instruction", "label_key": "chosen", "sort_key": "length", "num_key_value_heads": 4,
    "key": 3, "keyboard": "qwerty", "monkey": "x", "token_variable": "REWARD_TOKEN", "key_file": "id.pem", "api_key_name": "KEY",
    "secretary": "x", "author": "me", "step_token": "<step>", "token_type": "wordpiece", "eos_token_id": 2,
    "special_tokens": ["<a>"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(secrets, "_remembered", set())
    for name in list(os.environ):
        if secrets.is_secret(name, "x"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_key_that_names_a_credential_keeps_its_name_and_loses_its_value(name):
    assert without_secrets({"servers": [{name: "hunter2", "url": "u"}]}) == {"servers": [{name: "***", "url": "u"}]}
    assert without_secrets({name: ["hunter2", "hunter3"]}) == {name: ["***", "***"]}
    assert without_secrets([f"reward_model.{name}=hunter2"]) == [f"reward_model.{name}=***"]
    assert "hunter2" not in redact(f"lockstep run seed=1 +reward_model.{name}=hunter2")


@pytest.mark.parametrize("name", ["pass", "token", "key", "auth"])
def test_columns_and_parts_of_a_reward_may_be_called_like_credentials(name):
    """Else a run on other rows, or with other weights, would be taken for the same."""
    config = {"data": {"prompts": [{"path": "a.jsonl", "where": {name: "alpha"}}]}, "reward_model": {"weights": {name: 1.0}}}
    assert without_secrets(config) == config
    hidden = without_secrets({"where": {name: "hf_abcdefghijklmnopqrstuvwxyz"}})
    assert hidden == {"where": {name: "***"}}


@pytest.mark.parametrize("name", OTHERS)
def test_a_key_that_only_sounds_like_a_credential_keeps_its_value(name):
    assert without_secrets({"a": {name: OTHERS[name]}}) == {"a": {name: OTHERS[name]}}
    assert redact(f"policy.{name}={OTHERS[name]} is wrong") == f"policy.{name}={OTHERS[name]} is wrong"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:hunter2@example.org/score", "https://***@example.org/score"),
        ("https://hunter2@example.org", "https://***@example.org"),
        ("https://me:hun@ter2@example.org/", "https://***@example.org/"),
        ("http://h/score?key=hunter2", "http://h/score?key=***"),
        ("http://h/score?version=2&api_key=hunter2&n=1", "http://h/score?version=2&api_key=***&n=1"),
        ("http://h/score?X-Amz-Security-Token=hunter2", "http://h/score?X-Amz-Security-Token=***"),
        ("http://h/f?code=hunter2hunter2hunter2==", "http://h/f?code=***"),
        ("http://h/#access_token=hunter2", "http://h/#access_token=***"),
    ],
)
def test_a_url_loses_its_user_and_the_keys_in_its_query(url, shown):
    assert without_secrets({"url": url}) == {"url": shown}
    assert redact(f"no answer from {url} in time") == f"no answer from {shown} in time"
    assert without_secrets([f"reward_model.url={url}"]) == [f"reward_model.url={shown}"]


@pytest.mark.parametrize(
    "url",
    ["http://h:8000/v2/score", "http://h/score?version=2&max_tokens=5&eos_token=x&code=python", "https://h/@me/x", "hf://a/b"],
)
def test_a_url_without_a_secret_stays_as_it_is(url):
    assert without_secrets(url) == url == redact(url)


@pytest.mark.parametrize(
    "text", ["hf_abcdefghijklmnopqrstuvwxyz", "sk-proj-abcdefghijklmnopqrst", "ghp_" + "a1" * 15, "AKIAABCDEFGHIJKLMNOP"]
)
def test_well_known_credentials_are_hidden_wherever_they_are(text):
    assert without_secrets({"tags": ["a", f"x {text}"]}) == {"tags": ["a", "x ***"]}


@pytest.mark.parametrize(
    "text",
    [
        "Anthropic/hh-rlhf", "sk-learn", "hf_model", "task-sk-1", "user:name", "key: value", "key=value, +key=value to add one",
        "Set policy.tokenizer.pad_token='<|pad|>'.", "token: </s>", "secret: of the owl",
        "reward_model.token_variable=REWARD_TOKEN",
        "Missing: reward_model.api_key. Set it: reward_model.api_key=...", "password: required", "a=1 b=2", "eos_token: '</s>'",
    ],
)  # fmt: skip
def test_prose_and_names_stay_as_they_are(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        '{"error": {"api_key": "hunter2"}}', '{"token": "hunter2"}', "Authorization: Bearer hunter2",
        "reward_model={api_key:hunter2}",
        "x-api-key: hunter2", "reward_model.key=hunter2 is not", "'a.api_key=hunter2'", "{'password': 'hunter2'}",
    ],
)  # fmt: skip
def test_a_message_that_spells_a_secret_out_is_redacted(text):
    assert "hunter2" not in redact(text) and "***" in redact(text)


def test_values_of_secret_variables_are_hidden_under_any_name(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse/battery")
    secrets.remember("n0-name-tells")
    config = {"name": "run-correct horse/battery", "tags": ["n0-name-tells", "correct%20horse%2Fbattery"], "seed": 1}
    assert without_secrets(config) == {"name": "run-***", "tags": ["***", "***"], "seed": 1}
    assert redact("echo: correct horse/battery") == "echo: ***"


def test_the_path_of_the_current_folder_is_no_password(monkeypatch, tmp_path):
    monkeypatch.setenv("PWD", str(tmp_path))
    assert redact(f"wrote {tmp_path}/runs/demo/report.html") == f"wrote {tmp_path}/runs/demo/report.html"


def test_short_values_of_variables_hide_no_words(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "demo")
    monkeypatch.setenv("EOS_TOKEN", "everything")
    assert redact("demo of everything") == "demo of everything"


@pytest.mark.parametrize("text", ["a", " ", "a.", "://", "a=", "?a=b&", "'", ":", "a: ", "x://@", "hf_", "[", "a:'", "Bearer "])
def test_long_text_of_any_kind_is_searched_in_linear_time(text):
    started = time.perf_counter()
    redact(text * (2 * 10**5 // len(text)))
    assert time.perf_counter() - started < 20  # in quadratic time it takes minutes


def test_hiding_twice_changes_nothing():
    config = {"url": "http://a:b@h/?key=x", "api_key": "x", "args": ["a.token=x"], "n": [1, None, True]}
    once = without_secrets(config)
    assert without_secrets(once) == once and redact(once["url"]) == once["url"]


def test_a_group_on_the_command_line_is_searched_too():
    assert without_secrets(["+reward_model={url:u,api_key:hunter2}"]) == ["+reward_model={url:u,api_key:***}"]
    assert without_secrets(["a.prompt=say key=value", "a.text=x: y"]) == ["a.prompt=say key=value", "a.text=x: y"]


def test_a_chat_template_keeps_every_letter():
    template = "{% set token='x' %}{{ eos_token }}{% if key == 'a' %}secret: {{ message['content'] }}{% endif %}password=1"
    assert without_secrets({"chat_template": template}) == {"chat_template": template}


# --------------------------------------------------------------------------------------------------- records of a run

SECRET = ["reward_model=endpoint", "reward_model.url='http://h/v2/score?key=hunter2'", "~stages.reward", "seed=3"]


def runner(folder, *overrides) -> Runner:
    """A runner of the tiny pipeline whose stages are skipped."""
    given = [*TINY, *DECODER, *SECRET, f"folder={folder}", *overrides]
    return Runner(Experiment(compose(given)), Console(), shlex.join(["lockstep", "run", *given]))


@pytest.fixture
def skipped(monkeypatch):
    monkeypatch.setattr(Runner, "_stage", lambda self, stage: None)
    monkeypatch.setattr(Runner, "_plan", lambda self: [])  # which makes all of the data


def test_no_record_of_a_run_holds_a_secret(tmp_path, skipped, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "of-wandb-hunter2")
    run = runner(tmp_path, "tracker=wandb", "tracker.tags=['of-wandb-hunter2']")
    run.run()
    for stage in run.experiment.stages.values():
        tracked = run._tracked(stage, run.experiment.folders[stage.name], resume=False)
        assert "hunter2" not in repr(tracked.start)
    written = {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert {"run.json", "config.yaml", "stages.json"} <= set(written)
    assert all("hunter2" not in text for text in written.values())
    assert "http://h/v2/score?key=***" in written["config.yaml"] and "key=***" in json.loads(written["run.json"])["command"]
    assert "hunter2" not in capsys.readouterr().out
    assert run.experiment.stages["ppo"].reward_model["url"].endswith("?key=hunter2")  # what is asked is not what is written


def test_another_secret_in_the_same_place_is_the_same_run_and_the_same_stages(tmp_path, skipped):
    first = runner(tmp_path)
    first.run()
    other = runner(tmp_path, "reward_model.url='http://h/v2/score?key=rotated'")
    assert other.experiment.name == first.experiment.name and other.experiment.identities == first.experiment.identities
    other.run()
    assert finished(other.experiment.config) is None  # its stages were skipped; nothing in the way of a look
    why = stored.why(other.experiment)
    assert set(why) == set(first.experiment.stages) and not any(word in repr(why) for word in ("hunter2", "rotated"))


def test_what_is_no_secret_makes_another_run_and_is_named(tmp_path, skipped):
    runner(tmp_path, "name=one").run()
    with pytest.raises(ConfigError, match=r"reward_model.url: http://h/v2/score\?key=\*\*\* -> http://h/v3/score\?key=\*\*\*"):
        runner(tmp_path, "name=one", "reward_model.url='http://h/v3/score?key=hunter2'")
    first, second = (runner(tmp_path, f"policy.tokenizer.eos_token={token}").experiment for token in ("a", "b"))
    assert first.name != second.name and first.identities["sft"] != second.identities["sft"]


def test_a_name_with_a_secret_in_it_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2-hunter2")
    for name in (
        ["name=x-${oc.env:MY_TOKEN}"],
        ["experiment_name=${oc.env:MY_TOKEN}"],
        ["experiment_name=${oc.env:MY_TOKEN}", "name=a"],
    ):
        with pytest.raises(ConfigError, match="The run's name holds a secret") as caught:
            run_name(compose(name))
        assert "hunter2" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_the_configuration_that_is_printed_holds_no_secret(capsys):
    command.run(None, ["--config", *SECRET])
    printed = capsys.readouterr().out
    assert "hunter2" not in printed and "url: http://h/v2/score?key=***" in printed


def test_a_sweeps_record_holds_no_secret_and_finds_its_jobs_again(tmp_path):
    record = SweepFolder(tmp_path)
    (tmp_path / "multirun.yaml").write_text("hydra: {overrides: {task: [a.api_key=hunter2]}}\na: {api_key: hunter2, n: 1}\n")
    record.begin("lockstep run")
    for key in ("hunter2", "rotated-hunter2"):
        record.note(["seed=1", f"reward_model.api_key={key}"], status="failed", error=f"reward_model.api_key={key} is wrong")
    assert record.jobs() == [
        {"overrides": ["seed=1", "reward_model.api_key=***"], "status": "failed", "error": "reward_model.api_key=*** is wrong"}
    ]
    assert all("hunter2" not in file.read_text() for file in tmp_path.iterdir())
    assert "n: 1" in (tmp_path / "multirun.yaml").read_text()
    first, second, other = (
        sweeps.sweep_folder(["-m", "reward_model=endpoint", f"reward_model.url='http://h/{query}'", "seed=1,2"])
        for query in ("?key=a", "?key=b", "v2?key=a")
    )
    assert first == second != other
