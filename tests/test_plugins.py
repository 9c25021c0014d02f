"""Plugins as strangers bring them: a package of their own, found by entry point, with configuration of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs import DECODER, PPO_ONLY, TINY

GUIDE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()


def listing(language: str) -> str:
    """The first listing of the guide in this language."""
    return re.search(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)[1]


MODULE = listing("python")


@pytest.fixture
def site(tmp_path):
    """A folder as pip would leave it: a module, its configuration, its metadata."""
    (tmp_path / "stranger.py").write_text(MODULE)
    (tmp_path / "stranger_conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "stranger_conf" / "algorithm" / "reinforce.yaml").write_text(listing("yaml"))
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lockstep.plugins]\nstranger = stranger:plugin\n")
    return tmp_path


def lockstep(site, *arguments):
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
    command = [sys.executable, "-m", "lockstep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_strangers_algorithm_is_listed_with_its_distribution(site):
    done = lockstep(site, "plugins")
    assert "stranger (stranger)" in done.stdout, done.stderr


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_strangers_algorithm_runs_by_name_with_its_own_configuration(site, backend):
    done = lockstep(
        site, "run", *TINY, *DECODER, *PPO_ONLY, "algorithm=reinforce", f"backend={backend}", f"folder={site / 'runs'}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = next(site.glob("runs/stages/ppo-*/metrics.jsonl")).read_text()
    assert '"policy/loss"' in metrics and "policy/approx_kl" not in metrics


def test_a_configuration_that_would_shadow_another_is_refused(site):
    (site / "stranger_conf" / "algorithm" / "ppo.yaml").write_text("name: ppo\n")
    done = lockstep(site, "run", "--config")
    assert done.returncode == 1
    assert "algorithm/ppo.yaml comes from lockstep-rlhf (core) and from stranger (stranger). Rename one." in done.stdout


def test_a_plugin_that_cannot_be_imported_is_listed_and_breaks_nothing(site):
    (site / "stranger.py").write_text("raise RuntimeError('no luck')\n")
    done = lockstep(site, "plugins")
    assert "stranger (stranger) cannot be loaded: RuntimeError('no luck')" in done.stdout
    assert "ppo" in done.stdout
    done = lockstep(site, "run", *TINY, *DECODER, "algorithm.name=reinforce")
    assert "Not loaded: stranger (stranger): RuntimeError('no luck')" in done.stdout


def test_two_plugins_of_one_name_are_refused_by_name(site):
    (site / "stranger.py").write_text(MODULE.replace('"reinforce":', '"ppo":'))
    done = lockstep(site, "plugins")
    assert done.returncode == 1
    assert "Both lockstep-rlhf (rlhf) and stranger (stranger) register the algorithm 'ppo' for every backend" in done.stdout
