"""The records of runs and stages: those that are empty, cut off or somebody else's, in every reader."""

import contextlib
import json
import logging
import os

import pytest

from lockstep.api import sources
from lockstep.api.results import Run
from lockstep.commands.cache import stored
from lockstep.commands.run.sweeps import SweepFolder, objective
from lockstep.errors import CheckpointError, DataError, LockstepError
from lockstep.reporting.compare import reading
from lockstep.reporting.summary import summary
from lockstep.runs import store
from lockstep.storage import records
from lockstep.storage.files import read_json
from lockstep.storage.records import mismatch, read_record, read_rows, stage_folders
from run_folders import write_run
from runs import tiny
from test_sweeps import ALONE

FOREIGN = [
    b"", b" \n", b"{", b"null", b"[]", b"5", b'"x"', b"\x00\x01\xff\xfe", "\u2028".encode(), b"9" * 6000, b"[" * 100_000,
    b'{"name": 1, "stages": []}', b'{"stages": {"sft": null}}', b'{"jobs": [null]}', b'{"step": true, "state": {}}',
    b'{"kind": null}',
    b'{"steps": 0, "seconds": 1, "metrics": {"loss": "high"}, "output": {}}', b'{"splits": {"heldout": {"ppo": {"gold": 5}}}}',
    b'{"sft": {"backend": {"name": 5}}}',
]  # fmt: skip
KINDS = {name: kind for name, kind in vars(records).items() if isinstance(kind, records.Record)}
WHOLE = {"name": "x", "experiment": "e", "seed": 0, "status": "done", "backend": {"name": "torch"}, "stages": {}}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_file_that_is_no_such_record_is_named_with_what_is_wrong_and_what_may_be_removed(name, tmp_path):
    file, kind = tmp_path / "record.json", KINDS[name]
    for content in FOREIGN:
        if name == "STAGE" and content.startswith(b"{") and len(content) > 1:
            continue  # any object
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_record(file, kind)
        message = str(caught.value)
        assert message.startswith(f"{file} ") and kind.what in message and "Remove " in message and len(message) < 600, message


def test_an_absent_record_is_not_called_damaged(tmp_path):
    with pytest.raises(CheckpointError, match=r"^There is no .*run.json, the record of a run\.$"):
        read_record(tmp_path / "run.json", records.RUN)


@pytest.mark.parametrize("folder", ["/etc", "stages/../../etc", "stages/..", "stages/.x", "stages/a/b", "elsewhere", "", 5, None])
def test_a_run_cannot_send_its_readers_out_of_the_folder_of_stages(folder):
    with_stage = lambda place: WHOLE | {"stages": {"sft": {"folder": place, "status": "done"}}}  # noqa: E731
    assert mismatch(with_stage(folder), records.RUN.shape).startswith("stages.sft.folder is ")
    assert mismatch(with_stage("stages/sft-torch-0"), records.RUN.shape) is None


def test_a_mismatch_says_where_and_what():
    shape = {"a": int, "b?": [records.NUMBER], "c?": (str, None)}
    wrong = {
        "a is missing": {}, "a is true, not a whole number": {"a": True}, "a is 1.5, not a whole number": {"a": 1.5},
        "b is 5, not a list": {"a": 1, "b": 5}, 'b[1] is "x", not a number': {"a": 1, "b": [1, "x"]},
        "c is 5, not text": {"a": 1, "c": 5}, "it is [], not an object": [],
    }  # fmt: skip
    assert {message: mismatch(value, shape) for message, value in wrong.items()} == {message: message for message in wrong}
    assert mismatch({"a": 1, "b": [1, 2.5, float("nan")], "c": None, "d": {}}, shape) is None
    assert mismatch({"a": {}, "b": 1}, {records.EACH: dict}) == "b is 1, not an object"
    assert mismatch(10**400, records.NUMBER) is not None  # no float holds it


# --------------------------------------------------------------------------------------------------- JSON-lines files


def test_lines_that_are_no_rows_are_skipped_with_one_warning_and_others_keep_every_character(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 2, "note\u2028\u0085\x0c": 2.0}]
    bad = [
        b"[1]\n",
        b"\xff\n",
        b"{\n",
        b"\n",
        b'{"step": "3"}\n',
        b'{"loss": 1}\n',
        b'{"step": 3, "loss": "x"}\n',
        b"[" * 99_999 + b"\n",
    ]
    good = [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows]
    file.write_bytes(b"".join([good[0], *bad, *good[1:], b'{"step": 3, "lo']))
    assert list(read_rows(file, records.METRICS)) == rows
    assert [record.message for record in caplog.records] == [f"{file}: 8 lines skipped (line 2: it is [1], not an object)"]
    assert list(read_rows(tmp_path / "absent.jsonl")) == []


@pytest.mark.parametrize("lost", [1, 20, 41, 10_000])
def test_records_continue_after_whole_lines_if_the_file_lost_its_end(lost, tmp_path, caplog):
    first = store.Records(tmp_path)
    first.metrics(0, {"loss": 1.0})
    first.metrics(1, {"loss": 2.0})
    positions = first.positions()
    first.close()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-lost])
    again = store.Records(tmp_path, positions)
    again.metrics(2, {"loss": 3.0})
    again.close()
    assert "metrics.jsonl lost its last lines" in caplog.text
    steps = [row["step"] for row in map(json.loads, file.read_text().splitlines())]
    assert steps == ([0, 2] if lost <= 41 else [2])


def test_a_stage_resumes_although_its_metrics_lost_a_line_and_have_a_bad_one(tmp_path, monkeypatch, caplog):
    from lockstep_rlhf.algorithms.pretraining import Pretraining

    step = Pretraining.step

    def until_three(self, number):
        if number == 3:
            raise RuntimeError("the power is out")
        return step(self, number)

    options = [*ALONE, "checkpoint_every=1"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Pretraining, "step", until_three)
        tiny(tmp_path, *options)
    [file] = tmp_path.glob("stages/*/metrics.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"#" + b"".join(lines)[1:-5])
    run = tiny(tmp_path, *options)
    assert read_json(run / "run.json")["status"] == "done"
    assert "metrics.jsonl lost its last lines" in caplog.text and "pretrain resumes at step 3 of 4" in caplog.text
    assert f"{file}: 1 line skipped (line 1: " in caplog.text
    assert [json.loads(line)["step"] for line in file.read_bytes().splitlines()[1:]] == [1, 3, 4]


def test_a_foreign_checkpoint_is_set_aside_although_its_sums_are_right(tmp_path, caplog):
    folder = store.StageFolder(tmp_path)
    for number in (1, 2):
        folder.save(number, lambda path: (path / "learner").write_text("1"), {})
    state = tmp_path / "checkpoints" / "00000002" / "state.json"
    state.write_text('{"step": "2", "state": {}}')
    (state.parent / "sums.json").write_text(json.dumps({"state.json": store.checksum(state)}))
    (tmp_path / "checkpoints" / "²").mkdir()  # a digit, but no number
    assert folder.restore(lambda path: None) == (1, {})
    assert "state.json is not the state of a checkpoint: step is " in caplog.text


# ------------------------------------------------------------------------------------------------------- every reader


@pytest.fixture
def run(tmp_path):
    """A run that only its readers know; its stages have ids as real ones have."""
    return write_run(tmp_path / "runs", "torch", 0)


READERS = {
    "compare": lambda run: reading.read([run]),
    "the folder of runs": lambda run: reading.read([run.parent]),
    "status": lambda run: Run(run).status,
    "metrics": lambda run: Run(run).metrics,
    "outputs": lambda run: Run(run).outputs("policy"),
    "chat": lambda run: sources.find(run, "policy"),
    "summary": summary,
    "objective": lambda run: objective(run, "sft/loss"),
    "cache": lambda run: stored.entries(run.parent, stored.users(run.parent)),
    "prune": lambda run: stored.unused(run.parent),
}


OF_A_STAGE = ("done.json", "output/output.json", "output/evaluation.json")


@pytest.mark.parametrize("name", ["run.json", "stages.json", "config.yaml", *OF_A_STAGE])
def test_every_reader_says_which_file_it_cannot_read_or_does_without_it(name, run):
    file = (run.parent / "stages" / f"sft-{run.name}" if name in OF_A_STAGE else run) / name
    for content in (b"", b"[]", b"\xff\xfe", b'{"stages": {"sft": null}}', b'{"kind": null}'):
        file.write_bytes(content)
        for reader in READERS.values():
            with contextlib.suppress(LockstepError):  # anything else fails this test
                reader(run)


def test_a_comparison_names_every_file_that_it_does_without(run, tmp_path):
    stages = run.parent / "stages"
    for place in (f"evaluate-{run.name}/output/evaluation.json", f"sft-{run.name}/done.json"):
        (stages / place).write_bytes(b"\xff")
    with open(stages / f"ppo-{run.name}" / "metrics.jsonl", "a") as file:
        file.write("not a row\n")
    (stages / f"pretrain-{run.name}").rename(tmp_path / "elsewhere")
    problems = "\n".join(reading.read([run]).problems)
    for said in (
        f"evaluate-{run.name}/output/evaluation.json cannot be read: ", f"sft-{run.name}/done.json cannot be read: ",
        f"ppo-{run.name}/metrics.jsonl: 1 line skipped (line 121: ", f"its pretrain cannot be read: there is no {stages}/pre",
    ):  # fmt: skip
        assert said in problems, problems


def test_a_foreign_sweep_beside_runs_is_named_and_the_runs_compared(run):
    sweep = run.parent / "sweeps" / "0123abcd"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text("[]")
    found = reading.read([run.parent])
    assert [r.name for r in found.runs] == [run.name] and "sweep.json is not the record of a sweep" in found.problems[0]
    for call in (
        lambda: reading.read([sweep]),
        SweepFolder(sweep).jobs,
        lambda: SweepFolder(sweep).note(["seed=0"], status="done"),
    ):
        with pytest.raises(CheckpointError, match="sweep.json is not the record of a sweep: .*finished jobs are reused"):
            call()
    assert (sweep / "sweep.json").read_text() == "[]"


def test_a_run_that_was_moved_deeper_still_finds_its_stages(run):
    deep = run.parent / "old" / "first"
    deep.parent.mkdir()
    before = Run(run).metrics
    run.rename(deep)
    assert Run(deep).metrics.equals(before)
    assert set(stage_folders(deep, read_json(deep / "run.json"))) == {"pretrain", "sft", "reward", "ppo", "ppo_ptx", "evaluate"}


@pytest.mark.parametrize("name", ["run.json", "stages.json", "config.yaml"])
def test_a_run_is_not_resumed_over_somebody_elses_record_and_after_its_removal_it_is(name, finished_run, caplog):
    file = finished_run / name
    mine = file.read_bytes()
    for content in (b"", b'{"theirs": 1}'):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} .*Remove it and rerun the command of the run"):
            tiny(finished_run.parent, *ALONE)
        assert file.read_bytes() == content
    file.unlink()
    assert tiny(finished_run.parent, *ALONE) == finished_run
    assert name == "run.json" or file.read_bytes() == mine
    assert "starts over" not in caplog.text


def test_a_checkpoint_with_a_run_json_of_its_own_is_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"id": "theirs"}')
    assert sources.find(tmp_path, "policy") == (tmp_path, None)


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_what_has_no_end_is_not_read(name, run, caplog):
    (run / name).unlink()
    os.mkfifo(run / name)
    metrics = run.parent / "stages" / f"sft-{run.name}" / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    with pytest.raises(DataError, match=f"{name}.* it is no regular file"):
        reading.read([run])
    assert list(read_rows(metrics)) == [] and f"{metrics} is no regular file" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("backend: {name: torch}\na: &a [x, x]\nb: [*a, *a]\n", "it has an alias"),
        ("backend: {name: torch}\na: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("backend: torch\n", 'backend is "torch", not an object'),
        ("- 1\n", "not an object"),
        ("a: [\n", "while parsing"),
        ("", "it is null"),
    ],
)
def test_a_configuration_is_values_and_no_more(content, said, run):
    (run / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=f"config.yaml is not the configuration of a run: .*{said}.* Remove it"):
        Run(run).config  # noqa: B018


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    logging.getLogger("lockstep").propagate = True
    return tiny(tmp_path_factory.mktemp("runs"), *ALONE)


def test_a_run_from_before_there_were_engines_is_the_same_run(tmp_path):
    folder = store.RunFolder(tmp_path, "old")
    folder.path.mkdir()
    now = {"seed": 0, "backend": {"name": "torch"}, "engine": None}
    folder.write_config({key: value for key, value in now.items() if key != "engine"})
    assert folder.config_changes(now) == []
    assert folder.config_changes(now | {"engine": {"name": "vllm", "server": {}}}) != []
