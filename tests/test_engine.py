"""Rollouts by an engine: the decorator in the core, and the client of vLLM against a server on loopback that speaks its part of
the API. benchmarks/log.md has runs by the real one."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from conftest import Scored, configure
from lockstep.config.compose import compose
from lockstep.errors import ConfigError, EngineFailed, Stopped
from lockstep.interfaces import Engine, Generated
from lockstep.learning.online import Online
from lockstep.learning.randomness import token_seeds
from lockstep.learning.served import AHEAD, EngineConfig, Served, digest
from lockstep.registry import registry
from lockstep.runs.experiment import Experiment
from lockstep_vllm import plugin
from lockstep_vllm.server import Server
from runs import DECODER, TINY, tiny
from test_metrics_page import documented
from test_processes import together
from test_resume import assert_same
from vllm_server import FakeVLLM, client

if ("engine", "vllm", None) not in registry().components:
    registry().add(plugin, "lockstep-rlhf (vllm)")

STOP, PAD = 35, 36
GROUP = {"samples": 3, "batch_size": 4}
PPO = {"batch_size": 6, "minibatches": 2, "epochs": 2, "value_network": "shared"}


@pytest.fixture
def vllm():
    server = FakeVLLM()
    yield server
    server.close()


@pytest.fixture
def served(vllm, tmp_path):
    """served(...): an engine at work, with settings of the client."""
    return lambda **settings: Served(client(vllm.url, **settings), tmp_path / "weights")


def call(rows=3, columns=5):
    tokens = np.random.default_rng(1).integers(0, 34, (rows, 4)).astype(np.int32)
    mask = np.ones((rows, 4), bool)
    mask[0, :2] = False
    return tokens, mask, token_seeds(0, "engine", 0, rows, columns)


HOW = {"temperature": 0.7, "stop_ids": [STOP, 3], "pad_id": PAD}


on_torch = pytest.mark.parametrize("backend", ["torch"], indirect=True)
"""For what does not depend on the backend."""


def drawn(served, policy):
    return served.policy(policy).generate(*call(), **HOW)


def decisive(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("perf/", "sampler/"))}


@pytest.mark.parametrize(("name", "changes"), [("ppo", PPO), ("policy_gradient", GROUP)])
def test_an_algorithm_trains_on_the_same_tokens_as_without_an_engine(make, served, name, changes):
    own = make(name, reward_model=Scored(), **changes)
    other = make(name, reward_model=Scored(), engine=served(), **changes)
    for step in range(3):
        one, two = own.step(step), other.step(step)
        assert decisive(one) == decisive(two)
        assert two["sampler/mismatch_max"] < 1e-4
        assert (own.last.sequences.tokens == other.last.sequences.tokens).all()
        assert [row | {"drawn_by": None} for row in own.samples()] == [row | {"drawn_by": None} for row in other.samples()]
    assert [row["drawn_by"] for row in other.samples()] == [other.sampler.engine.version[:12]] * len(other.samples())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_and_log_probabilities_are_the_policy_s(load, served, temperature):
    policy, how = load(), HOW | {"temperature": temperature}
    own, other = policy.generate(*call(), **how), served().policy(policy).generate(*call(), **how)
    assert (own.tokens == other.tokens).all() and (own.mask == other.mask).all()
    np.testing.assert_allclose(own.logprobs[own.mask], other.logprobs[own.mask], atol=1e-5)
    assert other.tokens.dtype == np.int32 and other.cache is None


@on_torch
def test_weights_are_handed_over_once_for_each_change(load, served, vllm, tmp_path):
    engine = served()
    for number in (0, 0, 1, 0):
        drawn(engine, load(number))
    assert vllm.loads == [digest(load(number)) for number in (0, 1, 0)]
    assert not (tmp_path / "weights").exists() and not vllm.paused
    salts = [each["cache_salt"] for each in vllm.draws]
    assert set(salts) == {"loading", digest(load(0)), digest(load(1))}  # no key or value of other weights is found by it


@on_torch
def test_an_answer_by_other_weights_is_an_error(load, served, vllm):
    engine = served()
    drawn(engine, load())
    vllm.version = "of another run"
    with pytest.raises(EngineFailed, match=r"was given the weights \w{12} and drew with of another \.\.\.|drew with of another"):
        drawn(engine, load())


def choice(**changes):
    def spoil(answer):
        answer["choices"][0] |= {name: change(answer["choices"][0]) for name, change in changes.items()}
        return answer

    return spoil


def content(change):
    """The tokens that ``change`` makes of a response's, their log-probabilities, and the version that drew them all."""
    return choice(
        token_ids=lambda c: [each["token_id"] for each in change(c["logprobs"]["content"])],
        logprobs=lambda c: {"content": change(c["logprobs"]["content"])},
        weight_versions=lambda c: [c["weight_versions"][0] | {"end": len(change(c["logprobs"]["content"]))}],
    )


def spans(*limits):
    """Spans of the version that drew, from n to before n of each pair."""
    return choice(weight_versions=lambda c: [c["weight_versions"][0] | {"start": one, "end": end} for one, end in limits])


def token(token_id=1, logprob=-1.0):
    return {"token_id": token_id, "logprob": logprob}


BROKEN = {
    "too long": (content(lambda c: [token()] * 6), "with 6 tokens to a request for at most 5"),
    "empty": (content(lambda c: []), "a response is empty, or has a gap"),
    "cut": (content(lambda c: [token()]), "ends before its limit, with no token that ends it"),
    "after the end": (content(lambda c: [token(STOP), *[token()] * 4]), "goes on after the token that ends it"),
    "NaN": (content(lambda c: [token(logprob=math.nan)] * 5), "a log-probability is not finite"),
    "beyond float32": (content(lambda c: [token(logprob=-1e300)] * 5), "a log-probability is not finite"),
    "a number of 400 digits": (content(lambda c: [token(logprob=-(10**400))] * 5), "what is no response"),
    "above 0": (content(lambda c: [token(logprob=0.5)] * 5), "a log-probability is above 0"),
    "unknown token": (content(lambda c: [token(37)] * 5), "a token is not from 0 to 36"),
    "huge token": (content(lambda c: [token(2**40)] * 5), "what is no response"),
    "text": (content(lambda c: [token("1")] * 5), "what is no response"),
    "of other tokens": (choice(token_ids=lambda c: [0] * 5), "their log-probabilities do not match"),
    "two": (lambda answer: {"choices": answer["choices"] * 2}, "what is no response"),
    "none": (lambda answer: {"choices": []}, "what is no response"),
    "no version": (spans(), "does not say for each of its tokens which weights drew it"),
    "a first token without a version": (spans((1, 5)), "does not say for each of its tokens"),
    "a last token without a version": (spans((0, 4)), "does not say for each of its tokens"),
    "a token between without a version": (spans((0, 2), (3, 5)), "does not say for each of its tokens"),
    "two versions of a token": (spans((0, 3), (2, 5)), "does not say for each of its tokens"),
    "versions of more tokens": (spans((0, 6)), "does not say for each of its tokens"),
    "two versions": (
        choice(weight_versions=lambda c: [c["weight_versions"][0] | {"end": 1}, {"version": "x", "start": 1, "end": 5}]),
        "drew with .*x",
    ),
    "not JSON": (lambda answer: b"<html>", "what is no response"),
    "deep": (lambda answer: b"[" * 20_000, "what is no response"),
    "huge": (lambda answer: b" " * 2**18, "with more than .* bytes"),
    "an error": (lambda answer: 500, "answered /inference/v1/generate with 500: no"),
    "switched off": (lambda answer: 403, "It needs --enable-scale-out"),
}


@on_torch
@pytest.mark.parametrize("case", BROKEN)
def test_an_answer_that_cannot_be_samples_is_one_clear_error(load, served, vllm, case):
    engine, (spoil, message) = served(), BROKEN[case]
    drawn(engine, load())
    fives, rows = content(lambda c: [token()] * 5), itertools.count()
    vllm.spoil = lambda answer: spoil(fives(answer)) if next(rows) == 1 else fives(answer)  # one of three
    with pytest.raises(EngineFailed, match=message) as failure:
        drawn(engine, load())
    assert "docs/scale.md" in str(failure.value) or "rerun" in str(failure.value)


class Short(Engine):
    """Answers for one row less."""

    def load(self, folder, version):
        self.version = version

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        shape = (len(seeds) - 1, seeds.shape[1])
        return Generated(np.zeros(shape, np.int32), np.ones(shape, bool), np.zeros(shape, np.float32)), frozenset([self.version])


@on_torch
def test_an_engine_that_answers_for_other_rows_is_an_error(load, tmp_path):
    with pytest.raises(EngineFailed, match=r"its answer is \(2, 5\), the seeds \(3, 5\)"):
        drawn(Served(Short(EngineConfig()), tmp_path / "weights"), load())


@on_torch
def test_a_server_that_does_not_answer_is_an_error(load, served, vllm):
    engine = served()
    drawn(engine, load())  # hands the weights over, under a limit that a machine under load keeps
    vllm.silent = ("/inference/v1/generate",)
    engine.engine.config = client(vllm.url, timeout_seconds=1.0).config
    with pytest.raises(EngineFailed, match="did not answer within engine.server.timeout_seconds=1.*rerun the same command"):
        drawn(engine, load())


@on_torch
def test_a_server_that_is_gone_is_an_error(load, served, vllm):
    vllm.close()
    with pytest.raises(
        EngineFailed, match="No connection to the vLLM server .*start it, and rerun the same command.*docs/scale.md"
    ):
        drawn(served(), load())


@on_torch
def test_a_hand_over_that_fails_leaves_no_version_that_is_accepted(load, served, vllm):
    engine = served()
    drawn(engine, load(0))
    vllm.missing = ("/collective_rpc",)
    with pytest.raises(EngineFailed, match="/collective_rpc with 404"):
        drawn(engine, load(1))
    assert vllm.version == "loading" and not vllm.paused and engine.version is None
    vllm.missing = ()
    drawn(engine, load(1))


@on_torch
def test_a_hand_over_that_takes_too_long_does_not_leave_the_server_paused(load, served, vllm):
    vllm.silent = ("/collective_rpc",)
    with pytest.raises(EngineFailed, match="did not answer within engine.server.timeout_seconds=1"):
        drawn(served(timeout_seconds=1.0), load())
    assert vllm.version == "loading" and not vllm.paused


@on_torch
def test_a_server_that_a_killed_run_left_paused_is_used(load, served, vllm):
    vllm.answer("/pause", None)
    vllm.answer("/update_weight_version", {"new_version": "loading"})
    drawn(served(timeout_seconds=60.0), load())
    assert not vllm.paused


INTERRUPTED = """
import signal, sys, threading
import numpy as np
from pathlib import Path
from vllm_server import client

signal.signal(signal.SIGINT, signal.default_int_handler)
engine = client(sys.argv[1])
if sys.argv[2] == "load":
    engine.load(Path("weights"), "v")
else:
    given = np.zeros((1, 1), np.int32), np.ones((1, 1), bool), np.zeros((1, 1), np.uint32)
    how = {"temperature": 1.0, "stop_ids": [], "pad_id": 0}
    threading.Thread(target=lambda: engine.generate(*given, **how), daemon=True).start()
    sys.stdin.readline()
"""


def interrupted(vllm, what, silent, end):
    """The exit status and stderr of a process that waits for a path that is silent, and there gets ``end``."""
    vllm.silent = (silent,)
    command = [sys.executable, "-c", INTERRUPTED, vllm.url, what]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes) as child:
        try:
            limit = time.monotonic() + 60
            while silent not in vllm.asked:
                assert child.poll() is None and time.monotonic() < limit, "it asked for nothing"
                time.sleep(0.01)
            end(child)
            _, said = child.communicate(timeout=20)
        finally:
            child.kill()
    return child.returncode, said


@pytest.mark.parametrize("silent", ["/resume", "/collective_rpc"])
def test_ctrl_c_does_not_wait_for_a_silent_server(vllm, silent):
    status, said = interrupted(vllm, "load", silent, lambda child: child.send_signal(signal.SIGINT))
    assert status != 0 and said.rstrip().endswith("KeyboardInterrupt") and not vllm.paused


def test_exit_does_not_wait_for_an_answer_in_flight(vllm):
    path = "/inference/v1/generate"
    assert interrupted(vllm, "generate", path, lambda child: child.stdin.write("\n")) == (0, "")


@on_torch
def test_a_server_without_the_endpoints_says_how_to_start_it(load, served, vllm):
    vllm.missing = ("/pause", "/resume")
    with pytest.raises(EngineFailed, match="VLLM_SERVER_DEV_MODE=1"):
        drawn(served(), load())


@on_torch
@pytest.mark.parametrize("setting", [{"processor": False}, {"mode": "processed_logprobs"}, {"mode": "raw_logprobs"}])
def test_a_server_that_does_not_draw_from_our_seeds_is_refused(load, tmp_path, setting):
    server = FakeVLLM(**setting)
    with pytest.raises(EngineFailed, match="--logits-processors lockstep_vllm.processor:Seeds --logprobs-mode processed_logits"):
        drawn(Served(client(server.url), tmp_path / "weights"), load())
    assert server.loads == [] and server.version == "default"  # it was not asked for what it cannot do, which ends vLLM
    server.close()


@on_torch
def test_the_server_s_own_sampler_is_said_once_and_measured(load, tmp_path, caplog):
    server = FakeVLLM(processor=False, mode="processed_logprobs")
    engine = Served(client(server.url, sampler="vllm"), tmp_path / "weights")
    with caplog.at_level(logging.WARNING, "lockstep"):
        for number in (0, 1):
            drawn(engine, load(number))
    assert caplog.text.count("do not follow from the run's seeds") == 1
    assert {each["sampling_params"]["temperature"] for each in server.draws[2:]} == {0.7}
    assert sorted(each["sampling_params"]["seed"] for each in server.draws[-3:]) == sorted(call()[2][:, 0].tolist())
    server.close()


@on_torch
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_log_probabilities_that_are_not_the_sampler_s_are_refused(load, tmp_path, mode):
    server = FakeVLLM(processor=False, mode=mode)
    with pytest.raises(EngineFailed, match="--logprobs-mode processed_logprobs"):
        drawn(Served(client(server.url, sampler="vllm"), tmp_path / "weights"), load())
    server.close()


@on_torch
def test_an_adapter_is_refused(load, served, monkeypatch):
    policy = load()
    monkeypatch.setattr(policy, "save", lambda folder: folder.mkdir())
    with pytest.raises(ConfigError, match="saves an adapter. Set engine=null"):
        drawn(served(), policy)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:8000/v1", "http://a:b@127.0.0.1"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match=r"engine.server.url=.* should look like"):
        Server.check(client(url).config)


def test_another_machine_needs_leave():
    with pytest.raises(ConfigError, match="is another machine.*engine.server.remote=true"):
        Server.check(client("http://10.0.0.7:8000").config)
    Server.check(client("http://10.0.0.7:8000", remote=True).config)
    Server.check(client("http://localhost:8000").config)


# --------------------------------------------------------------------------------------------------------- several processes


@on_torch
def test_process_0_asks_and_all_get_the_answer(load, served, vllm, tmp_path):
    policies = [load(), load()]
    policies[1].save = lambda folder: None  # as every backend's does on other processes than the first
    policy = policies[0]

    def one(processes):
        engine, policy = served(ahead=True), policies[processes.rank]
        engine.processes = processes
        engine.begin(policy, engine.policy(policy).call(*call(), **HOW))
        if processes.leads:
            (tmp_path / "checkpoint").mkdir()
        engine.save(tmp_path / "checkpoint")
        return drawn(engine, policy)

    own, found = policy.generate(*call(), **HOW), together(one)
    assert all((each.tokens == own.tokens).all() for each in found)
    assert len(vllm.loads) == 1 and len(vllm.draws) == 1 + 3  # the probe, and the rows


# ------------------------------------------------------------------------------------------------------------- one step ahead


def test_one_step_ahead_draws_with_the_weights_before_the_last_update(make, load, served):
    algorithm = make("ppo", reward_model=Scored(), engine=served(ahead=True), iterations=4, **PPO)
    sampler, before = make("ppo", reward_model=Scored(), iterations=4, **PPO).sampler, []
    for step in range(4):
        before.append(algorithm.policy.copy())
        metrics = algorithm.step(step)
        prompts, ids = algorithm.prompts_at(step * 6, 6)
        expected = sampler.sample(before[max(0, step - 1)], prompts, ids, algorithm.seeds(step))
        assert (algorithm.last.sequences.tokens == expected.sequences.tokens).all()
        mask = expected.sequences.mask
        np.testing.assert_allclose(algorithm.last.sampler_logprobs[mask], expected.logprobs[mask], atol=1e-5)
        now = before[step].evaluate(expected.sequences, ["logprobs"], temperature=algorithm.config.temperature)["logprobs"]
        np.testing.assert_allclose(algorithm.last.old_logprobs[mask], now[mask], atol=1e-5)  # the proximal policy is that of now
        assert metrics["sampler/steps_behind"] == min(step, 1)
        assert algorithm.samples()[0]["drawn_by"] == digest(before[max(0, step - 1)])[:12]
    assert algorithm.sampler.engine.flight is None  # nothing is drawn for a step that does not come


@on_torch
def test_what_is_logged_of_an_engine_is_on_the_page_and_no_other(make, served):
    own, ahead = (make("ppo", reward_model=Scored(), engine=engine, **PPO) for engine in (None, served(ahead=True)))
    assert ahead.step(0).keys() - own.step(0).keys() == documented("Rollouts by an engine") - {"sampler_mismatch"}


@on_torch
def test_the_correction_weighs_by_the_policy_of_now_over_the_one_that_drew(make, served):
    changes = PPO | {"correction": {"kind": "truncate", "level": "token", "low": 0.5, "high": 1.01}}
    algorithm = make("ppo", reward_model=Scored(), engine=served(ahead=True), iterations=3, **changes)
    for step in range(2):
        algorithm.step(step)
    rollout = algorithm.last
    mask = rollout.sequences.mask
    ratio = np.exp(rollout.old_logprobs - rollout.sampler_logprobs)
    assert np.abs(ratio[mask] - 1).max() > 1e-3
    np.testing.assert_allclose(algorithm.correction(rollout)[mask], np.minimum(ratio, 1.01)[mask], rtol=1e-5)


@on_torch
def test_one_step_ahead_gives_the_same_numbers_whatever_the_timing(make, served, vllm):
    found = []
    for seconds in (0.0, 0.05):
        vllm.seconds = seconds
        algorithm = make("policy_gradient", reward_model=Scored(), engine=served(ahead=True), iterations=3, **GROUP)
        found.append([decisive(algorithm.step(step)) for step in range(3)])
    assert found[0] == found[1]


@on_torch
def test_a_failure_in_the_air_is_raised_when_its_answer_is_needed(make, served, vllm):
    engine = served(ahead=True)
    algorithm = make("ppo", reward_model=Scored(), engine=engine, iterations=3, **PPO)
    algorithm.step(0)
    engine._land(engine.flight)
    vllm.spoil = lambda answer: 500
    algorithm.step(1)
    with pytest.raises(EngineFailed, match="generate with 500"):
        algorithm.step(2)


@on_torch
def test_what_cannot_be_drawn_ahead_is_refused(make, served):
    with pytest.raises(ConfigError, match="extra_rounds decides. Set engine.ahead=false"):
        make("policy_gradient", reward_model=Scored(), engine=served(ahead=True), extra_rounds=1, **GROUP)


@on_torch
def test_a_missing_correction_is_said(make, served, caplog):
    make("ppo", reward_model=Scored(), engine=served(ahead=True), **PPO)
    assert "algorithm.correction.kind=truncate" in caplog.text


# -------------------------------------------------------------------------------------------------------------------- runs

SHORT = ["~stages.ppo_ptx", "~stages.evaluate", "algorithm.iterations=4", "checkpoint_every=1", "backend.threads=1"]


def by(vllm, *more):
    return ["engine=vllm", f"engine.server.url={vllm.url}", *more]


def test_a_run_by_an_engine_gives_what_it_gives_without(vllm, tmp_path):
    """PPO and the evaluation."""
    options = ["~stages.ppo_ptx", "backend.threads=1"]
    own, other = tiny(tmp_path, *options), tiny(tmp_path, *options, *by(vllm))
    assert own != other
    found = []
    for run in (own, other):
        stages = json.loads((run / "run.json").read_text())["stages"]
        evaluation = run.parent / stages["evaluate"]["folder"] / "output" / "evaluation.json"
        content = json.loads(evaluation.read_text())
        for measures in (measures for split in content["splits"].values() for measures in split.values()):
            mismatch = measures.pop("sampler_mismatch", None)
            assert (mismatch is None) == (run == own) and (run == own or mismatch["mean"] < 1e-4)
        weights = run.parent / stages["ppo"]["folder"] / "output" / "model.safetensors"
        found.append((stages["sft"]["folder"], content["splits"], weights.read_bytes()))
    assert found[0] == found[1]  # the stages that sample nothing are the same folders
    assert not list(tmp_path.glob("stages/*/.*.part"))


def test_a_run_that_was_stopped_goes_on_bit_for_bit(vllm, tmp_path, monkeypatch):
    """With an answer in flight, which the checkpoint has to hold."""
    ahead = ["engine.ahead=true", "algorithm.correction.kind=truncate"]
    options = [*SHORT, *by(vllm, *ahead)]
    whole = tiny(tmp_path / "whole", *options)
    (begun := tmp_path / "begun" / "stages").mkdir(parents=True)
    for done in (tmp_path / "whole" / "stages").iterdir():
        if not done.name.startswith("ppo"):
            shutil.copytree(done, begun / done.name)
    with monkeypatch.context() as patch:
        from lockstep_rlhf.algorithms.ppo import PPO

        step = PPO.step

        def counted(self, number):
            metrics = step(self, number)
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return metrics

        patch.setattr(PPO, "step", counted)
        with pytest.raises(Stopped, match="after step 2"):
            tiny(tmp_path / "begun", *options)
    (checkpoint,) = begun.glob("ppo-*/checkpoints/00000002")
    assert (checkpoint / AHEAD).exists()
    other = FakeVLLM()  # another server, at another address, which knows nothing
    resumed = tiny(tmp_path / "begun", *SHORT, *by(other, *ahead))
    assert_same(resumed, whole)
    other.close()


def identities(*overrides):
    return Experiment(compose([*TINY, *DECODER, *overrides])).identities


def test_the_address_is_no_part_of_a_stage_and_only_stages_that_sample_have_an_engine():
    own, one, other = identities(), identities("engine=vllm"), identities("engine=vllm", "engine.server.timeout_seconds=5")
    assert one == other
    assert {name for name in own if own[name] != one[name]} == {"ppo", "ppo_ptx", "evaluate"}
    ahead = identities("engine=vllm", "engine.ahead=true")
    assert {name for name in own if ahead[name]["engine"] != one[name]["engine"]} == {"ppo", "ppo_ptx", "evaluate"}


def test_an_engine_that_no_stage_uses_is_refused():
    with pytest.raises(ConfigError, match="No stage samples, so none uses engine=vllm"):
        identities("engine=vllm", "~stages.ppo", "~stages.ppo_ptx", "~stages.evaluate")


def test_an_environment_is_not_drawn_ahead():
    _, config = configure("ppo", **PPO)
    algorithm = SimpleNamespace(context=SimpleNamespace(environment=object()), config=config)
    with pytest.raises(ConfigError, match="without an environment. Set engine.ahead=false"):
        Online.check_ahead(algorithm)


# ---------------------------------------------------------------------------------------------------- inside of the server


@pytest.fixture
def processor(monkeypatch):
    """`lockstep_vllm.processor`, with vLLM's interface as it is in 0.32 in place of the package."""
    inside = ModuleType("vllm.v1.sample.logits_processor")
    inside.LogitsProcessor, inside.BatchUpdate = object, object
    inside.MoveDirectionality = SimpleNamespace(UNIDIRECTIONAL="to", SWAP="swap")
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, inside.__name__, inside)
    monkeypatch.delitem(sys.modules, "lockstep_vllm.processor", raising=False)
    import lockstep_vllm.processor as module

    yield module
    sys.modules.pop("lockstep_vllm.processor", None)


def params(seeds, temperature=0.7, **more):
    asked = {"seeds": [int(seed) for seed in seeds], "temperature": temperature}
    return SimpleNamespace(extra_args={"lockstep": asked | more}, temperature=0, max_tokens=len(seeds))


def update(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=removed, added=added, moved=moved)


def test_the_processor_draws_as_the_backends_do_and_leaves_the_log_probability(processor):
    torch = pytest.importorskip("torch")
    from lockstep.learning.randomness import hash_gumbel

    seeds, logits = token_seeds(0, "engine", 0, 3, 2), np.random.default_rng(0).normal(0, 3, (4, 37)).astype(np.float32)
    work = processor.Seeds(None, torch.device("cpu"), False)
    drawn: list[list[int]] = [[], [], []]
    added = [(i, params(seeds[i], t), None, drawn[i]) for i, t in enumerate((0.7, 1.0, 0.7))]
    work.update_state(update(added=[*added, (3, SimpleNamespace(extra_args=None), None, [])]))
    for column in range(2):
        given = torch.tensor(logits)
        out = work.apply(given).numpy()
        assert (out[3] == logits[3]).all()  # a request of somebody else
        for i, temperature in enumerate((0.7, 1.0, 0.7)):
            scaled = logits[i] / temperature
            expected = int((scaled + hash_gumbel(seeds[i, column], 37)).argmax())
            assert out[i].argmax() == expected and np.isinf(out[i]).sum() == 36
            np.testing.assert_allclose(out[i, expected], scaled[expected] - np.logaddexp.reduce(scaled), atol=1e-5)
            drawn[i].append(expected)


def test_the_processor_follows_requests_that_move_in_the_batch(processor):
    torch = pytest.importorskip("torch")
    work = processor.Seeds(None, torch.device("cpu"), False)
    one, two, three = ([number] * 4 for number in (1, 2, 3))
    work.update_state(update(added=[(0, params(one), None, []), (1, params(two), None, []), (2, params(three), None, [])]))
    work.update_state(update(removed=[0], moved=[(2, 0, "to")]))
    assert {i: row.seeds[0] for i, row in work.rows.items()} == {0: 3, 1: 2}
    work.update_state(update(moved=[(0, 1, "swap")]))
    assert {i: row.seeds[0] for i, row in work.rows.items()} == {0: 2, 1: 3}
    work.update_state(update(added=[(1, SimpleNamespace(extra_args=None), None, [])]))
    assert list(work.rows) == [0]
    work.update_state(None)
    probed = processor.Seeds(None, torch.device("cpu"), False)
    probed.update_state(update(added=[(0, params(one, probe=True), None, [])]))
    assert probed.apply(torch.zeros(1, 37)).max().item() == processor.PROBE


def test_the_processor_and_the_client_agree_on_the_probe(processor):
    from lockstep_vllm import server

    assert processor.PROBE == server.PROBE


def test_the_processor_refuses_too_few_seeds_and_another_temperature(processor):
    good = params([1, 2])
    processor.Seeds.validate_params(good)
    for wrong in ({"max_tokens": 3}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match="needs temperature 0 and a seed for each"):
            processor.Seeds.validate_params(SimpleNamespace(**{**vars(good), **wrong}))


def test_a_tied_head_is_laid_out_again_after_new_weights(processor):
    did = []
    head = SimpleNamespace(quant_method=SimpleNamespace(process_weights_after_loading=lambda layer: did.append(layer)))
    worker = SimpleNamespace(
        reload_weights=lambda weights_path: did.append(weights_path), get_model=lambda: SimpleNamespace(lm_head=head)
    )
    processor.Weights.lockstep_load(worker, "/weights")
    assert did == ["/weights", head]
