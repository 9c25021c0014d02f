"""`lockstep compare wandb:...` and reports at W&B, with W&B's server replaced by what it would answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import wandb

from lockstep.errors import DataError
from lockstep.reporting.compare import claims, compare, groups, reading, wandb_report, wandb_runs, what_intervals_are_over
from run_folders import write_run


@dataclass
class Stage:
    """A W&B run, as far as it is read."""

    group: str
    job_type: str
    id: str
    config: dict[str, Any]
    state: str = "finished"
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def scan_history(self):
        return iter(self.history)


def stages(run: str, kl_coef: float, seed: int, shared: bool = False, state: str = "finished") -> list[Stage]:
    """What a run of SFT, PPO and an evaluation leaves; ``shared``: another run has made its SFT."""
    common = {"backend": {"name": "torch"}, "data": {"name": "miniature"}, "seed": seed}
    sft, ppo = f"sft-torch-{seed}", f"ppo-torch-{run}"
    history = [{"_step": s, "step": s, "objective/kl": 0.1 * s, "objective/score": 0.2 * s} for s in range(4)]
    losses = [{"_step": s, "step": s, "loss": 2.0 - 0.1 * s} for s in range(3)]
    evaluation = {"heldout/sft/gold": 1.0, "heldout/ppo/gold": 2.0 + seed, "heldout/sft/kl": 0.0, "heldout/ppo/kl": 4.0,
                  "reward_model/accuracy/gold": 0.8, "_runtime": 3.0}  # fmt: skip
    made = [
        Stage(run, "sft", sft, {**common, "stage": {"name": "sft"}, "inputs": {}}, history=losses),
        Stage(run, "ppo", ppo, {**common, "stage": {"name": "ppo", "kl_coef": kl_coef}, "inputs": {"sft": sft},
                                "reward_model": {"source": "reward"}}, state, {"_runtime": 9.0}, history),
        Stage(run, "evaluate", f"evaluate-{run}", {**common, "stage": {"baseline": "sft"}, "inputs": {"ppo": ppo, "sft": sft},
                                                   "reward_model": {"source": "reward"}}, summary=evaluation),
    ]  # fmt: skip
    return made[1:] if shared else made


@pytest.fixture
def server(monkeypatch):
    """Give it the W&B runs that there are; it has what was asked for."""

    class Server:
        answer: list[Stage] = []
        asked: tuple[str, dict] | None = None

        def runs(self, path, filters):
            self.asked = path, filters
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    found = Server()
    monkeypatch.setattr(wandb, "Api", lambda: found)
    return found


def test_stages_at_wandb_become_runs_with_settings_curves_and_evaluations(server):
    server.answer = [s for kl in (0.1, 0.2) for seed in (0, 1) for s in stages(f"kl{kl}-{seed}", kl, seed)]
    c = groups.group(reading.read(["wandb:me/rlhf?tags=paper"]), by=["backend", "algorithm.kl_coef"])
    assert server.asked == ("me/rlhf", {"tags": "paper"})
    assert [(g.label, g.seeds) for g in c.groups] == [("torch, kl_coef=0.1", [0, 1]), ("torch, kl_coef=0.2", [0, 1])]
    assert c.groups[0].scores("heldout", "ppo", "gold") == {"": {0: 2.0, 1: 3.0}}
    assert (c.baseline, c.after_baseline) == ("sft", ["ppo"])
    assert c.groups[0].curve("ppo", "objective/kl").mean == pytest.approx([0, 0.1, 0.2, 0.3])


def test_numbers_without_intervals_decide_nothing(server):
    """One run, gold 1.0 and 2.0: nothing says how far these may be off."""
    server.answer = stages("a", 0.1, 0)
    c = groups.group(reading.read(["wandb:me/rlhf"]))
    assert {claim.verdict for claim in claims.find(c)} == {"unclear"}
    assert claims.headline(c).startswith("No policy is known to raise the gold score of sft: ppo goes from 1.00 to 2.00 on")
    assert what_intervals_are_over(c) == "These records have no intervals over prompts, and so decide nothing."


@pytest.mark.parametrize(
    "config",
    [{}, {"stage": "train"}, {"stage": {}, "backend": "torch", "seed": 0, "inputs": {}}, {"stage": {"name": "sft"}, "seed": "0"}],
)
def test_runs_of_other_programs_in_the_same_project_are_named_and_left_out(server, config):
    server.answer = [Stage("a", "train", "theirs", config), *stages("mine", 0.1, 0)]
    found = reading.read(["wandb:me/rlhf"])
    assert [run.name for run in found.runs] == ["mine"]
    assert any(p.startswith("The W&B run theirs is left out: it is not Lockstep's (") for p in found.problems)


def test_a_stage_that_another_run_made_is_found_by_what_started_from_it(server):
    server.answer = [*stages("first", 0.1, 0), *stages("second", 0.2, 0, shared=True)]
    runs = {run.name: run for run in reading.read(["wandb:rlhf"]).runs}
    assert runs["second"].stages["sft"].identity == runs["first"].stages["sft"].identity == "sft-torch-0"
    assert runs["second"].stages["sft"].metrics["loss"].values.tolist() == pytest.approx([2.0, 1.9, 1.8])


def test_runs_that_crashed_are_named(server):
    server.answer = [*stages("whole", 0.1, 0), *stages("torn", 0.1, 1, state="crashed")]
    assert reading.read(["wandb:rlhf"]).problems == ["torn is not finished (failed): compared as far as it got."]


def test_filters_are_those_of_the_query_numbers_as_numbers_and_repeated_names_as_alternatives():
    assert wandb_runs.parse("wandb:me/rlhf?group=a&group=b&config.seed=0") == (
        "me/rlhf",
        {"group": {"$in": ["a", "b"]}, "config.seed": 0},
    )


def test_without_a_server_the_error_says_what_it_takes(server):
    server.answer = ConnectionError("no route")
    with pytest.raises(
        DataError, match=r"could not be queried for wandb:rlhf: no route\. It needs a network and an API key: wandb login"
    ):
        reading.read(["wandb:rlhf"])


def test_a_project_without_lockstep_runs_says_so(server):
    server.answer = [Stage("", "", "x", {})]
    with pytest.raises(DataError, match="No runs of Lockstep in wandb:rlhf: 1 W&B runs"):
        reading.read(["wandb:rlhf"])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return compare([write_run(folder, "torch", 0)], folder / "report")


def test_a_wandb_report_holds_the_tables_and_panels_over_the_stages_of_these_runs(comparison, monkeypatch):
    wr = pytest.importorskip("wandb_workspaces.reports.v2")
    saved = []

    def save(report):
        saved.append(report)
        object.__setattr__(report, "id", "abc")

    monkeypatch.setattr(wr.Report, "save", save)
    monkeypatch.setattr(wr.Report, "url", "https://wandb.example/report")
    assert wandb_report.publish(comparison, "me/rlhf") == "https://wandb.example/report"
    (report,) = saved
    assert (report.entity, report.project, report.description) == ("me", "rlhf", comparison.headline)
    text = next(b.text for b in report.blocks if isinstance(b, wr.MarkdownBlock))
    assert "| gold: sft < ppo | yes |" in text
    grids = [block for block in report.blocks if isinstance(block, wr.PanelGrid)]
    assert [grid.runsets[0].filters for grid in grids] == [
        "Group in ['demo-torch-0'] and JobType == 'ppo'", "Group in ['demo-torch-0'] and JobType == 'ppo_ptx'",
    ]  # fmt: skip
    assert all(panel.x == "step" for grid in grids for panel in grid.panels)


def test_a_wandb_report_needs_an_entity_and_a_project(comparison):
    pytest.importorskip("wandb_workspaces")
    with pytest.raises(DataError, match="--wandb-report rlhf: give ENTITY/PROJECT"):
        wandb_report.publish(comparison, "rlhf")


def test_a_wandb_report_without_its_package_says_what_to_install(comparison, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(DataError, match=r"pip install 'lockstep-rlhf\[wandb-report\]'"):
        wandb_report.publish(comparison, "me/rlhf")
