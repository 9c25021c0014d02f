"""The example package ``docs/examples/lockstep-numpy``, installed as a stranger's would be: a third backend that no file of
the repository knows."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("autograd")
pytest.importorskip("hatchling")
pytest.importorskip("torch")

from conftest import ARCHITECTURE, BACKENDS, head
from lockstep.config.schema import parse
from lockstep.models.architecture import initial_parameters, to_hf
from lockstep.registry import registry
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import write_tensors
from runs import DECODER, TINY, tiny
from test_parity import ADAM, dropout_term, ppo_term, rollout

PACKAGE = Path(__file__).parents[1] / "docs" / "examples" / "lockstep-numpy"
CHANGES = ["samples_every=1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Where pip has put it."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", folder, PACKAGE], check=True)
    return folder


def python(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def runs(site, tmp_path_factory) -> dict[str, Path]:
    """{backend: the folder of its stages}."""
    folder = tmp_path_factory.mktemp("runs")
    python(site, "lockstep", "run", *TINY, *DECODER, *CHANGES, "backend=numpy", f"folder={folder / 'numpy'}")
    tiny(folder / "torch", *CHANGES, "backend=torch", "backend.threads=1")
    return {name: folder / name / "stages" for name in ("numpy", "torch")}


def lines(stages: Path, stage: str, name: str) -> list[dict]:
    (folder,) = stages.glob(f"{stage}-*")
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- installed


def test_it_is_listed_with_its_distribution(site):
    listed = [line.split() for line in python(site, "lockstep", "plugins").stdout.splitlines()]
    assert ["backend", "numpy", "numpy", "lockstep-numpy", "(numpy)", "yes"] in listed
    assert ["policy", "decoder", "numpy", "lockstep-numpy", "(numpy)", "yes"] in listed


def test_its_own_tests_pass_where_it_is_installed(site):
    python(site, "pytest", "-p", "no:cacheprovider", PACKAGE / "tests")


def test_it_needs_neither_torch_nor_jax(site):
    script = site / "imports_alone.py"
    script.write_text(
        "import sys\n"
        "from lockstep.registry import registry\n"
        "import lockstep_numpy.learner\n"
        "registry().resolve('backend', 'numpy', 'numpy'), registry().resolve('policy', 'decoder', 'numpy')\n"
        "assert not {'torch', 'jax', 'flax'} & sys.modules.keys()\n"
    )
    python(site, "imports_alone")


# ------------------------------------------------------------------------------------------------- the whole pipeline


def test_the_pipeline_draws_the_tokens_of_torch(runs):
    for stage in ("ppo", "ppo_ptx"):
        drawn = {
            name: [(row["step"], row["prompt"], row["response"]) for row in lines(runs[name], stage, "samples")] for name in runs
        }
        assert drawn["numpy"] == drawn["torch"]
        assert {step for step, _, _ in drawn["numpy"]} == {0, 1, 2}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo", "ppo_ptx"])
def test_the_pipeline_logs_the_metrics_of_torch(runs, stage):
    ours, theirs = lines(runs["numpy"], stage, "metrics"), lines(runs["torch"], stage, "metrics")
    assert len(ours) == len(theirs) > 0
    for row, other in zip(ours, theirs, strict=True):
        names = {name for name in other if not name.startswith(("perf/", "seconds", "sampler/"))}
        assert names <= row.keys()
        for name in names:
            # The exact gradient of a reward model's bias is 0, and of its rounding Adam makes steps of a learning rate (5e-4)
            # in either backend: docs/parity.md.
            most = row["step"] * 1e-3 if name == "demonstrations/score_mean" else 1e-5
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=most), (name, row["step"])


def test_the_pipeline_ends_with_the_evaluation_of_torch(runs):
    found = {}
    for name, stages in runs.items():
        (file,) = stages.glob("evaluate-*/output/evaluation.json")
        found[name] = read_json(file)["splits"]["heldout"]
    for policy in ("pretrain", "sft", "ppo", "ppo_ptx"):
        for measure, interval in found["torch"][policy].items():
            mean = found["numpy"][policy][measure]["mean"]
            assert mean == pytest.approx(interval["mean"], rel=1e-3, abs=1e-4), (policy, measure)


# ------------------------------------------------------------------------------------- at the waist, with large weights


@pytest.fixture(scope="module")
def both(site, tmp_path_factory):
    """For each backend: itself, and a function that loads a fresh policy."""
    folder = tmp_path_factory.mktemp("policy")
    parameters = initial_parameters(ARCHITECTURE, 3)
    write_tensors(folder / "model.safetensors", {n: p * (10 if p.ndim > 1 else 1) for n, p in parameters.items()})
    write_json(folder / "config.json", to_hf(ARCHITECTURE))
    registry()  # filled before the path is changed: other tests do not see this backend
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        from lockstep_numpy.backend import NumpyBackend
        from lockstep_numpy.policies import Decoder
    torch = registry().resolve("backend", "torch", "torch")
    backend = torch(parse(torch.Config, BACKENDS["torch"], "backend"))
    ours = NumpyBackend(NumpyBackend.Config(precision="float32"))
    policy = registry().resolve("policy", "decoder", "torch")
    return (backend, lambda: policy.load(folder, backend)), (ours, lambda: Decoder.load(folder, ours))


def test_both_draw_the_same_tokens_and_evaluate_them_alike(both):
    (_, one), (_, other) = both
    sequences = rollout(one())
    assert np.array_equal(sequences.tokens, rollout(other()).tokens)
    names = ["logprobs", "entropy", "values", "scores"]
    for make, wanted in ((lambda p: p, names[:2]), (lambda p: p.scalar_model(head()), names[2:])):
        first, second = (make(load()).evaluate(sequences, wanted, temperature=0.7) for load in (one, other))
        for name in wanted:
            where = sequences.mask if first[name].ndim == 2 else slice(None)
            np.testing.assert_allclose(second[name][where], first[name][where], atol=2e-5, err_msg=name)


def test_learners_step_alike_and_go_on_from_each_others_checkpoints(both, tmp_path):
    optimizer = dataclasses.replace(ADAM, tf_style=True, ema_decay=0.9)
    sequences = rollout(both[0][1]())
    learners = []
    for backend, load in both:
        models = {"policy": load(), "value": load().scalar_model(head())}
        learners.append(backend.learner(models, {"policy": optimizer, "value": optimizer}))
    terms = [ppo_term(sequences), dropout_term()]
    first, second = (learner.gradients(terms) for learner in learners)
    assert first.keys() == second.keys()
    scale = max(np.abs(g).max() for g in first.values())
    assert max(np.abs(first[name] - second[name]).max() for name in first) < 1e-5 * scale
    for _ in range(2):
        one, other = (learner.update(terms, 0.5) for learner in learners)
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)

    folders = [tmp_path / "torch", tmp_path / "numpy"]
    for learner, folder in zip(learners, folders, strict=True):
        learner.save(folder)
    for learner, folder in zip(learners, reversed(folders), strict=True):
        learner.restore(folder)  # each takes the other's state
    one, other = (learner.update(terms) for learner in learners)
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name in ("policy", "value"):
        first, second = (learner.averaged(name).parameters() for learner in learners)
        assert max(np.abs(first[key] - second[key]).max() for key in first) < 1e-5
