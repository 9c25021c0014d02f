"""The studio's database: leases, labels, rounds, privacy; under threads and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lockstep.config.schema import parse
from lockstep.data.labels import candidates_in, demonstrations_in, labels_in
from lockstep.errors import CheckpointError, ConfigError, DataError
from lockstep.storage.records import read_rows
from lockstep_studio.data import Human
from lockstep_studio.exchange import trl_unpaired
from lockstep_studio.settings import GroupConfig, StudioConfig, read_settings
from lockstep_studio.sources import add_file, add_waiting
from lockstep_studio.store import conversations, labels, people, privacy, report, rounds, schema, screening, tasks
from lockstep_studio.store.database import FILE, Database, connect
from lockstep_studio.store.people import Refused

NOW = 1_000_000.0


def settings(**changes) -> StudioConfig:
    group = {"overlap_share": 0.0, "checks_share": 0.0, **changes.pop("group", {})}
    return parse(StudioConfig, {"groups": {"training": group}, **changes}, "")


def candidates(count: int, completions: int = 2, **changes) -> list[dict]:
    def row(i: int) -> dict:
        policies, scores = [f"ppo_1-torch-{k}" for k in range(completions)], [float(k * (i + 1)) for k in range(completions)]
        return {
            "id": f"{i:06d}", "messages": [{"role": "user", "content": f"question {i}"}],
            "completions": [f"answer {i}.{k}" for k in range(completions)], "policies": policies, "scores": scores, "seed": 17,
            "truth": {"secret": i}, **changes,
        }  # fmt: skip

    return [row(i) for i in range(count)]


def write(folder: Path, rows: list[dict], name: str = "candidates.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.fixture
def database(tmp_path):
    opened = Database(tmp_path / "studio")
    yield opened
    opened.close()


def joined(database: Database, count: int = 1, group: str = "training") -> list[people.Person]:
    token = database.now(people.invite, "labeler", group, count, 1.0, NOW)
    return [database.now(people.accept, token, None, None, NOW)[0] for _ in range(count)]


def filled(database: Database, tmp_path: Path, rows: list[dict], plan: StudioConfig) -> Path:
    file = write(tmp_path / "stages" / "collect_1-torch-abc", rows)
    add_file(database, file, "candidates", plan, NOW)
    return file


def vote(database, person, plan, mode="compare", ranks=(0, 1), now=NOW, **content):
    lease = database.now(tasks.lease, person, mode, plan, now)
    database.now(labels.record, person, lease.token, 0, {"ranks": list(ranks), **content}, plan, now + 5)
    return lease


# ------------------------------------------------------------------------------------------------------------ leases


def test_two_people_who_ask_at_once_never_hold_one_task(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(60), plan)
    crowd = joined(database, 60)
    with ThreadPoolExecutor(16) as pool:
        leases = list(pool.map(lambda person: database.now(tasks.lease, person, "compare", plan, NOW), crowd))
    assert len({lease.task for lease in leases}) == 60
    assert database.now(tasks.lease, joined(database)[0], "compare", plan, NOW) is None


def test_a_task_of_the_overlap_goes_to_as_many_people_as_planned_and_no_more(database, tmp_path):
    plan = settings(group={"overlap_share": 1.0, "overlap": 3})
    filled(database, tmp_path, candidates(1), plan)
    leases = [database.now(tasks.lease, person, "compare", plan, NOW) for person in joined(database, 4)]
    assert [lease is not None for lease in leases] == [True, True, True, False]


def test_who_asks_again_gets_the_same_task_in_the_same_order(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(20, 7), plan)
    (person,) = joined(database)
    first, second = (database.now(tasks.lease, person, "rank", plan, NOW + wait) for wait in (0, 60))
    assert (first.token, first.shown) == (second.token, second.shown)


def test_an_expired_task_goes_to_somebody_else_and_the_late_answer_is_refused(database, tmp_path):
    plan = settings(lease_minutes=10)
    filled(database, tmp_path, candidates(1), plan)
    slow, quick = joined(database, 2)
    lease = database.now(tasks.lease, slow, "compare", plan, NOW)
    assert database.now(tasks.lease, quick, "compare", plan, NOW + 599) is None
    assert database.now(tasks.lease, quick, "compare", plan, NOW + 600).task == lease.task
    with pytest.raises(Refused, match="given to somebody else"):
        database.now(labels.record, slow, lease.token, 0, {"ranks": [0, 1]}, plan, NOW + 601)


def test_a_late_answer_counts_if_nobody_else_has_the_task(database, tmp_path):
    plan = settings(lease_minutes=10)
    filled(database, tmp_path, candidates(1), plan)
    slow, quick = joined(database, 2)
    lease = database.now(tasks.lease, slow, "compare", plan, NOW)
    database.now(tasks.expire, NOW + 700)
    database.now(labels.record, slow, lease.token, 0, {"ranks": [0, 1]}, plan, NOW + 701)
    assert database.now(tasks.lease, quick, "compare", plan, NOW + 702) is None


def test_a_skipped_task_comes_to_others_and_never_again_to_the_same_person(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(1), plan)
    one, other = joined(database, 2)
    lease = database.now(tasks.lease, one, "compare", plan, NOW)
    for _ in range(2):  # sent twice
        database.now(tasks.skip, one, lease.token, "unclear", plan, NOW)
    assert database.now(tasks.lease, one, "compare", plan, NOW) is None
    assert database.now(tasks.lease, other, "compare", plan, NOW).task == lease.task


def test_one_person_cannot_answer_anothers_task(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(2), plan)
    one, other = joined(database, 2)
    lease = database.now(tasks.lease, one, "compare", plan, NOW)
    for act in (labels.record, tasks.skip):
        arguments = (0, {"ranks": [0, 1]}, plan, NOW) if act is labels.record else ("unclear", plan, NOW)
        with pytest.raises(Refused, match="no such task among yours"):
            database.now(act, other, lease.token, *arguments)


def test_tasks_whose_scores_differ_come_more_often_and_the_lease_says_how_likely(database, tmp_path):
    """Spreads 0 and 9 give the weights 0.1 and 1: probabilities 1/11 and 10/11."""
    plan = settings(group={"order": "disagreement"})
    rows = candidates(2)
    rows[0]["scores"], rows[1]["scores"] = [1.0, 1.0], [0.0, 9.0]
    filled(database, tmp_path, rows, plan)
    drawn, dice = [], random.Random(0)
    for person in joined(database, 200):
        lease = database.now(tasks.lease, person, "compare", plan, NOW, dice)
        drawn.append(lease)
        database.now(tasks.end, lease.id, "expired", NOW)
    by_task = {lease.task: lease.probability for lease in drawn}
    assert sorted(by_task.values()) == pytest.approx([1 / 11, 10 / 11])
    rare = min(by_task, key=by_task.__getitem__)
    assert 8 <= sum(lease.task == rare for lease in drawn) <= 32  # 18.2 expected, sd 4.1


def test_at_random_every_task_is_as_likely_as_the_number_left_to_the_person_says(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(4), plan)
    (person,) = joined(database)
    probabilities = [vote(database, person, plan).probability for _ in range(4)]
    assert probabilities == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


@pytest.mark.parametrize("items", [0, 2])
def test_checks_lower_a_probability_only_while_there_are_gold_items_to_give(database, tmp_path, items):
    plan = settings(group={"checks_share": 0.5})
    gold(database, tmp_path, items, plan) if items else None
    filled(database, tmp_path, candidates(3), plan)
    (person,) = joined(database)
    left, given = 3, 0
    while left:  # after the last task no gold item comes: it would be recognised as one
        if (lease := vote(database, person, plan)).gold is None:
            assert lease.probability == pytest.approx((0.5 if given < items else 1) / left)
            left -= 1
        else:
            given += 1
    assert given <= items
    assert database.now(tasks.lease, person, "compare", plan, NOW) is None


def test_what_a_person_has_judged_does_not_lower_the_probability_of_the_rest(database, tmp_path):
    plan = settings(group={"overlap_share": 1.0, "overlap": 2})
    filled(database, tmp_path, candidates(3), plan)
    (person,) = joined(database)
    assert [vote(database, person, plan).probability for _ in range(3)] == pytest.approx([1 / 3, 1 / 2, 1])


# ------------------------------------------------------------------------------------------------------------ labels


def test_a_vote_sent_twice_counts_once(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(1), plan)
    (person,) = joined(database)
    lease = database.now(tasks.lease, person, "compare", plan, NOW)
    send = lambda: database.now(labels.record, person, lease.token, 0, {"ranks": [1, 0]}, plan, NOW + 3)  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        ids = {recorded.id for recorded in pool.map(lambda _: send(), range(8))}
    assert len(ids) == 1
    assert database.reader.execute("SELECT count(*) FROM labels").fetchone()[0] == 1


def test_a_second_different_vote_is_refused_unless_it_says_that_it_is_a_revision(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(1, 3), plan)
    (person,) = joined(database)
    lease = vote(database, person, plan, "rank", (0, 1, 2))
    with pytest.raises(Refused, match="differently"):
        database.now(labels.record, person, lease.token, 0, {"ranks": [2, 1, 0]}, plan, NOW)
    database.now(labels.record, person, lease.token, 1, {"ranks": [2, 1, 0]}, plan, NOW + 9)
    stored = database.reader.execute("SELECT revision, content FROM labels ORDER BY revision").fetchall()
    assert [json.loads(row["content"])["ranks"] for row in stored] == [[0, 1, 2], [2, 1, 0]]
    with pytest.raises(Refused, match="another window"):
        database.now(labels.record, person, lease.token, 5, {"ranks": [0, 0, 0]}, plan, NOW)


def test_after_the_names_are_shown_there_is_no_vote(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(1), plan)
    (person,) = joined(database)
    lease = vote(database, person, plan)
    with pytest.raises(Refused, match="seen who wrote what"):
        database.now(labels.record, person, lease.token, 1, {"ranks": [1, 0]}, plan, NOW)


def test_labels_cannot_be_changed_or_deleted_even_by_hand(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(1), plan)
    vote(database, joined(database)[0], plan)
    for sql in ("UPDATE labels SET content = '{}'", "UPDATE labels SET content = NULL, at = 0", "DELETE FROM labels"):
        with pytest.raises(sqlite3.IntegrityError, match="labels (never change|are never deleted)"):
            database.now(lambda connection, sql=sql: connection.execute(sql))


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [([0, 1, 2], [0, 1, 2], 1.0), ([0, 1, 2], [2, 1, 0], 0.0), ([0, 0, 1], [0, 1, 2], 5 / 6), ([0, 0], [0, 0], 1.0)],
)
def test_concordance_is_the_share_of_pairs_ordered_alike(one, other, share):
    assert labels.concordance(one, other) == pytest.approx(share)


def test_two_people_who_disagree_call_an_adjudicator_who_judged_nothing_of_it(database, tmp_path):
    group = {"overlap_share": 1.0, "overlap": 2, "modes": ["compare", "adjudicate"]}
    plan = settings(group=group)
    filled(database, tmp_path, candidates(2), plan)
    crowd = joined(database, 2)
    for number, person in enumerate(crowd):
        for _ in range(2):
            lease = database.now(tasks.lease, person, "compare", plan, NOW)
            agreed = lease.completions[0] == "answer 0.0"
            ranks = [0, 1] if agreed or number else [1, 0]
            database.now(labels.record, person, lease.token, 0, {"ranks": ranks}, plan, NOW)
    assert [database.now(tasks.lease, person, "adjudicate", plan, NOW) for person in crowd] == [None, None]
    third = database.now(tasks.lease, joined(database)[0], "adjudicate", plan, NOW)
    assert third.completions[0] == "answer 1.0"


# ------------------------------------------------------------------------------------------------- screening, checks


def gold(database, tmp_path, count: int, plan) -> None:
    rows = [{**row, "ranks": [0, 1]} for row in candidates(count)]
    add_file(database, write(tmp_path, rows, "gold.jsonl"), "gold", plan, NOW)


@pytest.mark.parametrize(("right", "standing"), [(3, "active"), (2, "screened out")])
def test_a_new_member_is_screened_on_gold_items_first(database, tmp_path, right, standing):
    plan = settings(group={"screening": 4, "screening_accuracy": 0.7})
    gold(database, tmp_path, 6, plan)
    filled(database, tmp_path, candidates(5), plan)
    (person,) = joined(database)
    for number in range(4):
        lease = vote(database, person, plan, ranks=(0, 1) if number < right else (1, 0))
        assert lease.gold == [0, 1] and lease.probability is None
    assert database.reader.execute("SELECT standing FROM people").fetchone()[0] == standing
    if standing == "active":
        assert database.now(tasks.lease, person, "compare", plan, NOW).gold is None
    else:
        with pytest.raises(Refused, match="not for you"):
            database.now(tasks.lease, person, "compare", plan, NOW)


def test_who_fails_attention_checks_is_paused(database, tmp_path):
    plan = settings(group={"checks_share": 1.0, "checks_window": 3, "checks_accuracy": 0.5})
    gold(database, tmp_path, 5, plan)
    filled(database, tmp_path, candidates(1), plan)
    (person,) = joined(database)
    for ranks in ((0, 1), (1, 0)):
        vote(database, person, plan, ranks=ranks)
    assert database.reader.execute("SELECT standing FROM people").fetchone()[0] == "active"
    vote(database, person, plan, ranks=(1, 0))
    assert database.reader.execute("SELECT standing FROM people").fetchone()[0] == "paused"


# ------------------------------------------------------------------------------------------------------------ people


def test_an_invitation_lets_in_as_many_as_it_says_and_only_in_time(database):
    token = database.now(people.invite, "labeler", "training", 1, 1.0, NOW)
    with pytest.raises(Refused, match="used up or too old"):
        database.now(people.accept, token, None, None, NOW + 3601)
    database.now(people.accept, token, None, None, NOW)
    with pytest.raises(Refused, match="used up or too old"):
        database.now(people.accept, token, None, None, NOW)


def test_secrets_are_stored_as_hashes_only(database):
    token = database.now(people.invite, "labeler", "training", 2, 1.0, NOW)
    _, session = database.now(people.accept, token, None, None, NOW)
    dump = "\n".join(connect(database.path).iterdump()).lower()
    assert not any(form in dump for secret in (token, session) for form in (secret.lower(), secret.encode().hex()))


def test_changed_instructions_need_a_new_version(database):
    database.now(people.publish_instructions, settings(), NOW)
    with pytest.raises(Refused, match="groups.training: the instructions or the consent changed"):
        database.now(people.publish_instructions, settings(group={"instructions": "Be quick."}), NOW)
    database.now(people.publish_instructions, settings(group={"instructions": "Be quick.", "version": "2"}), NOW)


# ------------------------------------------------------------------------------------------------------------ rounds


def closed(database, tmp_path, name="first"):
    database.now(privacy.remember, privacy.scan(database.reader), NOW)
    return rounds.close(database, tmp_path / "studio", name, NOW + 100)


def test_closing_writes_labels_in_the_order_of_the_candidates(database, tmp_path):
    plan = settings()
    file = filled(database, tmp_path, candidates(3, 4), plan)
    (person,) = joined(database)
    given = {}
    for number in range(3):
        lease = vote(database, person, plan, "rank", ranks := [number, 0, 1, 1])
        given[lease.messages[0]["content"]] = ranks
    closed(database, tmp_path)
    about = candidates_in(file)
    read = labels_in(file.with_name("labels.jsonl"), about)
    prompts = {each.id: each.prompt.messages[0].content for each in about}
    assert {prompts[label.id]: list(label.ranks) for label in read} == given
    assert {(label.labeler, label.group) for label in read} == {(person.pseudonym, "training")}


def test_a_closed_round_holds_the_provenance_of_every_label(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(1, 3), plan)
    (person,) = joined(database)
    lease = vote(database, person, plan, "rank", [1, 0, 1], ratings=[4, 7, None], flags=[["opinion"], [], []])
    record = closed(database, tmp_path)
    (row,) = read_rows(tmp_path / "studio" / "rounds" / "first" / "comparisons.jsonl")
    assert row == {
        "id": "000000", "messages": [{"role": "user", "content": "question 0"}],
        "completions": ["answer 0.0", "answer 0.1", "answer 0.2"], "ranks": [1, 0, 1], "labeler": person.pseudonym,
        "group": "training", "ratings": [4, 7, None], "flags": [["opinion"], [], []],
        "policies": ["ppo_1-torch-0", "ppo_1-torch-1", "ppo_1-torch-2"], "shown": list(lease.shown), "scores": [0.0, 1.0, 2.0],
        "seed": 17, "seconds": 5.0, "at": NOW + 5, "instructions": "1", "revision": 0, "mode": "rank", "adjudicated": False,
        "both_bad": False, "blind": True, "probability": 1.0,
    }  # fmt: skip
    assert record["counts"] == {"comparisons": 1, "demonstrations": 0, "conversations": 0}


def test_the_hash_of_a_round_is_that_of_its_files_and_a_change_is_noticed(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(2), plan)
    vote(database, joined(database)[0], plan)
    record = closed(database, tmp_path)
    folder = tmp_path / "studio" / "rounds" / "first"
    found = subprocess.run(
        "cat comparisons.jsonl demonstrations.jsonl conversations.jsonl | sha256sum", shell=True, cwd=folder, capture_output=True
    )
    assert found.stdout.split()[0].decode() == record["sha256"]
    rounds.verify(tmp_path / "studio", "first")
    (folder / "comparisons.jsonl").chmod(0o644)
    (folder / "comparisons.jsonl").write_text("")
    with pytest.raises(DataError, match="was changed after the round was closed"):
        rounds.verify(tmp_path / "studio", "first")


def test_a_closed_round_takes_no_more_votes_and_no_changes_of_mind(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(3, 3), plan)
    one, other, late = joined(database, 3)
    done = vote(database, one, plan, "rank", (0, 1, 2))
    pending = database.now(tasks.lease, other, "rank", plan, NOW)
    closed(database, tmp_path)
    with pytest.raises(Refused, match="closed, so its labels stand"):
        database.now(labels.record, one, done.token, 1, {"ranks": [2, 1, 0]}, plan, NOW)
    with pytest.raises(Refused, match="closed meanwhile"):
        database.now(labels.record, other, pending.token, 0, {"ranks": [2, 1, 0]}, plan, NOW)
    assert database.now(tasks.lease, late, "rank", plan, NOW) is None
    with pytest.raises(Refused, match="nothing to close"):
        closed(database, tmp_path, "second")


def test_a_round_that_a_kill_interrupted_is_finished_at_the_next_start(database, tmp_path, monkeypatch):
    plan = settings()
    file = filled(database, tmp_path, candidates(2), plan)
    vote(database, joined(database)[0], plan)
    database.now(privacy.remember, privacy.scan(database.reader), NOW)
    database.now(rounds._begin, "first", NOW)
    rounds.finish_all(database, tmp_path / "studio")
    assert len(labels_in(file.with_name("labels.jsonl"), candidates_in(file))) == 1
    assert database.reader.execute("SELECT state FROM rounds").fetchone()[0] == "closed"


def test_where_a_task_was_adjudicated_only_the_adjudicator_is_trained_on(database, tmp_path):
    plan = settings(group={"overlap_share": 1.0, "overlap": 2, "modes": ["compare", "adjudicate"]})
    file = filled(database, tmp_path, candidates(1), plan)
    crowd = joined(database, 3)
    for person, ranks in zip(crowd, ([0, 1], [1, 0]), strict=False):
        vote(database, person, plan, ranks=ranks)
    vote(database, crowd[2], plan, "adjudicate", (0, 0))
    closed(database, tmp_path)
    (label,) = labels_in(file.with_name("labels.jsonl"), candidates_in(file))
    assert (label.labeler, label.ranks) == (crowd[2].pseudonym, (0, 0))
    rows = list(read_rows(tmp_path / "studio" / "rounds" / "first" / "comparisons.jsonl"))
    assert [(row["ranks"], row["adjudicated"]) for row in rows] == [([0, 1], False), ([1, 0], False), ([0, 0], True)]


def test_a_round_over_two_runs_names_its_tasks_apart(database, tmp_path):
    """Every run counts its candidates from 0."""
    plan = settings()
    filled(database, tmp_path, candidates(2), plan)
    other = [row | {"messages": [{"role": "user", "content": f"other {row['id']}"}]} for row in candidates(2)]
    add_file(database, write(tmp_path / "stages" / "collect_1-torch-def", other), "candidates", plan, NOW)
    (person,) = joined(database)
    for _ in range(4):
        vote(database, person, plan)
    closed(database, tmp_path)
    folder = tmp_path / "studio" / "rounds" / "first"
    rows = list(read_rows(folder / "comparisons.jsonl"))
    assert {row["id"] for row in rows} == {"1:000000", "1:000001", "2:000000", "2:000001"}
    assert len(Human(Human.Config(str(folder), heldout_fraction=0.0)).comparisons("train")) == 4
    for file in tmp_path.glob("stages/*/candidates.jsonl"):
        assert len(labels_in(file.with_name("labels.jsonl"), candidates_in(file))) == 2


def test_a_round_whose_folder_is_there_from_before_the_database_is_refused(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(2), plan)
    vote(database, joined(database)[0], plan)
    (tmp_path / "studio" / "rounds" / "first").mkdir(parents=True)
    with pytest.raises(Refused, match="exists already, from before this database"):
        closed(database, tmp_path)
    assert rounds.waiting(database.reader)["comparisons"] == 1
    assert closed(database, tmp_path, "second")["counts"]["comparisons"] == 1


def test_changed_gold_items_take_the_place_of_the_old_ones(database, tmp_path):
    plan = settings(group={"screening": 1})
    file = write(tmp_path, [{**row, "ranks": [0, 1]} for row in candidates(2)], "gold.jsonl")
    add_file(database, file, "gold", plan, NOW)
    one, other = joined(database, 2)
    assert database.now(tasks.lease, one, "compare", plan, NOW).gold == [0, 1]
    write(tmp_path, [{**row, "ranks": [1, 0]} for row in candidates(3)], "gold.jsonl")
    add_file(database, file, "gold", plan, NOW)
    for person in (one, other):
        assert database.now(tasks.lease, person, "compare", plan, NOW).gold == [1, 0]
    (count,) = database.reader.execute(f"SELECT count(*) FROM tasks WHERE {screening.CURRENT}").fetchone()
    assert count == 3
    add_file(database, file, "gold", plan, NOW)
    assert database.reader.execute("SELECT count(*) FROM sources WHERE kind = 'gold'").fetchone()[0] == 2


def test_gold_items_and_the_labels_of_paused_people_stay_out_of_a_round(database, tmp_path):
    plan = settings(group={"screening": 1})
    gold(database, tmp_path, 2, plan)
    filled(database, tmp_path, candidates(4), plan)
    one, other = joined(database, 2)
    for person in (one, one, other, other):
        vote(database, person, plan)
    database.now(people.set_standing, other.id, "paused")
    assert closed(database, tmp_path)["counts"]["comparisons"] == 1


def test_the_removed_work_of_a_person_is_in_no_later_round_and_leaves_a_tombstone(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(4), plan)
    one, other = joined(database, 2)
    vote(database, one, plan)
    vote(database, other, plan)
    assert database.now(privacy.remove, one.id, NOW) == {"labels": 1, "messages": 0, "rounds": []}
    assert closed(database, tmp_path)["counts"]["comparisons"] == 1
    assert database.now(privacy.remove, other.id, NOW)["rounds"] == ["first"]
    assert database.reader.execute("SELECT count(*) FROM tombstones").fetchone()[0] == 2
    assert [row["content"] for row in database.reader.execute("SELECT content FROM labels")] == [None, None]


def test_text_with_personal_data_waits_for_the_operator(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(2), plan)
    (person,) = joined(database)
    for response in ("Ask jane.doe@example.org about it.", "Water it twice a week."):
        lease = database.now(tasks.lease, person, "write", plan, NOW)
        database.now(labels.record, person, lease.token, 0, {"response": response}, plan, NOW)
    assert closed(database, tmp_path)["counts"]["demonstrations"] == 1
    (held,) = privacy.held_back(database.reader)
    assert held["text"] == "Ask jane.doe@example.org about it." and "email" in held["found"]
    database.now(privacy.decide, held["kind"], held["id"], "release", NOW)
    assert closed(database, tmp_path, "second")["counts"]["demonstrations"] == 1


def test_conversations_keep_the_branch_that_was_chosen(database, tmp_path):
    (person,) = joined(database)
    token = database.now(
        conversations.create, person, "chat", ["sft-torch-1"], {"system": "Be brief.", "temperature": 1.0}, "1", NOW
    )
    row = conversations.conversation_of(database.reader, person, token, "chat")
    parent, ((first, _),) = database.now(conversations.ask, row, None, "hello", [("sft-torch-1", 7)], NOW)
    database.now(conversations.finish, first, "hi", "done")
    _, ((second, _),) = database.now(conversations.ask, row, parent, None, [("sft-torch-1", 8)], NOW)
    database.now(conversations.finish, second, "good day", "done")
    database.now(conversations.give_feedback, person, second, {"thumb": 1, "likert": 6}, NOW)
    closed(database, tmp_path)
    (talk,) = read_rows(tmp_path / "studio" / "rounds" / "first" / "conversations.jsonl")
    assert [m["content"] for m in talk["messages"]] == ["Be brief.", "hello", "good day"]
    assert talk["seeds"] == [8] and talk["feedback"] == [{"turn": 0, "thumb": 1, "likert": 6, "text": None}]
    assert (talk["policy"], talk["attack"]) == ("sft-torch-1", None)
    data = Human(Human.Config(folder=str(tmp_path / "studio" / "rounds"), heldout_fraction=0.0))
    (liked,) = data.demonstrations("train")  # the answer with the thumb, after the system message and the question
    assert [m.content for m in liked.prompt.messages] == ["Be brief.", "hello"] and liked.response == "good day"


@pytest.mark.parametrize(
    ("feedback", "state", "counts"),
    [
        ({"thumb": 1}, "done", True), ({"likert": 6}, "done", True), ({"likert": 5}, "done", False),
        ({"thumb": -1}, "done", False), ({"thumb": -1, "likert": 7}, "done", False), ({"thumb": 1}, "stopped", False),
        ({"text": "well"}, "done", False),
    ],
)  # fmt: skip
def test_only_whole_answers_that_somebody_liked_are_demonstrations(database, tmp_path, feedback, state, counts):
    (person,) = joined(database)
    token = database.now(conversations.create, person, "chat", ["sft-torch-1"], {"temperature": 1.0}, "1", NOW)
    row = conversations.conversation_of(database.reader, person, token, "chat")
    _, ((answer, _),) = database.now(conversations.ask, row, None, "hello", [("sft-torch-1", 7)], NOW)
    database.now(conversations.finish, answer, "hi", state)
    database.now(conversations.give_feedback, person, answer, feedback, NOW)
    closed(database, tmp_path)
    rows = list(read_rows(tmp_path / "studio" / "rounds" / "first" / "demonstrations.jsonl"))
    assert len(rows) == counts
    if counts:
        assert (rows[0]["mode"], rows[0]["seed"], rows[0]["policy"]) == ("chat", 7, "sft-torch-1")
        assert demonstrations_in(tmp_path / "studio" / "rounds" / "first")[0].response == "hi"


def test_an_answer_that_failed_is_no_demonstration_whoever_liked_it(database, tmp_path):
    (person,) = joined(database)
    token = database.now(conversations.create, person, "chat", ["sft-torch-1"], {"temperature": 1.0}, "1", NOW)
    answer = None
    for state in ("done", "failed"):
        row = conversations.conversation_of(database.reader, person, token, "chat")
        _, ((answer, _),) = database.now(conversations.ask, row, answer, "hello", [("sft-torch-1", 7)], NOW)
        database.now(conversations.finish, answer, "hi", state)
        database.now(conversations.give_feedback, person, answer, {"thumb": 1}, NOW)
    closed(database, tmp_path)
    folder = tmp_path / "studio" / "rounds" / "first"
    assert len(list(read_rows(folder / "demonstrations.jsonl"))) == 1
    (talk,) = read_rows(folder / "conversations.jsonl")
    assert talk["stopped"] == [1] and [each["turn"] for each in talk["feedback"]] == [0, 1]
    assert len(list(trl_unpaired._lines(talk))) == 1


# ----------------------------------------------------------------------------------------------------------- sources


def test_a_stage_that_has_its_labels_waits_for_nothing(database, tmp_path):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    stages = {f"collect_{i}": {"folder": f"stages/collect_{i}-torch-a", "status": "running"} for i in (1, 2)}
    record = {"name": "mine", "experiment": "x", "seed": 0, "status": "running", "backend": {"name": "torch"}, "stages": stages}
    (run / "run.json").write_text(json.dumps(record))
    for i in (1, 2):
        write(tmp_path / "runs" / "stages" / f"collect_{i}-torch-a", candidates(3))
    write(tmp_path / "runs" / "stages" / "collect_1-torch-a", [], "labels.jsonl")
    assert add_waiting(database, [run], settings(), NOW) == 3
    assert add_waiting(database, [run], settings(), NOW) == 0


def test_tasks_of_a_stage_that_got_its_labels_from_elsewhere_are_closed_and_its_labels_stay(database, tmp_path):
    plan = settings()
    file = filled(database, tmp_path, candidates(3), plan)
    one, other = joined(database, 2)
    vote(database, one, plan)
    held = database.now(tasks.lease, other, "compare", plan, NOW)
    file.with_name("labels.jsonl").write_text("theirs\n")
    add_waiting(database, [], plan, NOW)
    assert database.now(tasks.lease, one, "compare", plan, NOW) is None
    assert tasks.lease_of(database.reader, other, held.token).outcome == "closed"
    closed(database, tmp_path)
    assert file.with_name("labels.jsonl").read_text() == "theirs\n"


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"completions": ["one"]}, "at least two completions"), ({"scores": [1.0]}, "2 completions, but 1 scores"),
     ({"messages": "hello"}, "messages"), ({"id": 5}, "id is 5")],
)  # fmt: skip
def test_a_row_that_is_no_task_is_named_by_its_line(database, tmp_path, change, problem):
    file = write(tmp_path, [candidates(1)[0], {**candidates(2)[1], **change}])
    with pytest.raises(DataError, match=f"candidates.jsonl, line 2: .*{problem}"):
        add_file(database, file, "candidates", settings(), NOW)


def test_truth_is_not_even_in_the_database(database, tmp_path):
    filled(database, tmp_path, candidates(2), settings())
    assert "secret" not in "\n".join(connect(database.path).iterdump())


def test_settings_that_cannot_work_say_what_would(tmp_path):
    file = tmp_path / "studio.yaml"
    file.write_text("groups: {mine: {overlp: 2}}")
    with pytest.raises(ConfigError, match="groups.mine.overlp. Did you mean 'overlap'"):
        read_settings(file)
    file.write_text("")
    assert read_settings(file) == StudioConfig() and "training" in StudioConfig().groups
    assert read_settings(None).groups["heldout"] == GroupConfig()


# --------------------------------------------------------------------------------------------- the file, under stress


def test_only_one_process_may_serve_a_folder(database, tmp_path):
    with pytest.raises(CheckpointError, match="Another process serves"):
        Database(tmp_path / "studio")


def test_a_failing_write_takes_no_other_with_it(database):
    def bad(connection):
        connection.execute("INSERT INTO failures (who, at) VALUES ('lost', 0)")
        raise ValueError("no")

    futures = [database.submit(bad if i % 2 else people.attempt, *([] if i % 2 else [{"kept": 99}, NOW])) for i in range(20)]
    assert sum(future.exception() is not None for future in futures) == 10
    found = [row["who"] for row in database.reader.execute("SELECT who FROM failures")]
    assert found == ["kept"] * 10


def test_a_backup_made_while_people_vote_is_whole(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(300), plan)
    crowd = joined(database, 6)
    with ThreadPoolExecutor(6) as pool:
        votes = [pool.submit(lambda p: [vote(database, p, plan) for _ in range(40)], person) for person in crowd]
        copy = database.backup(tmp_path / "backups" / "copy.sqlite3")
        [each.result() for each in votes]
    stored = connect(copy)
    assert stored.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert (
        stored.execute("SELECT count(*) FROM leases WHERE outcome = 'labelled'").fetchone()[0]
        == (stored.execute("SELECT count(*) FROM labels").fetchone()[0])
    )


VOTER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_studio_store import NOW, Database, joined, settings, vote
database, plan = Database(Path(sys.argv[1])), settings()
(person,) = joined(database)
while True:
    print(vote(database, person, plan).token, flush=True)
"""


def test_killed_at_any_moment_no_acknowledged_vote_is_lost_or_doubled(tmp_path):
    plan = settings()
    opened = Database(tmp_path / "studio")
    filled(opened, tmp_path, candidates(4000), plan)
    opened.close()
    told, dice = [], random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", VOTER, str(tmp_path / "studio"), str(Path(__file__).parent)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        told += [process.stdout.readline().strip() for _ in range(5)]
        time.sleep(dice.uniform(0.02, 0.5))
        process.send_signal(signal.SIGKILL)
        told += [line.strip() for line in process.stdout.read().splitlines() if len(line.strip()) == len(told[0])]
        process.wait()
    opened = Database(tmp_path / "studio")
    stored = [row["token"] for row in opened.reader.execute("SELECT token FROM labels JOIN leases ON leases.id = lease")]
    per_task = opened.reader.execute("SELECT max(n) FROM (SELECT count(*) AS n FROM labels GROUP BY task)").fetchone()[0]
    opened.close()
    assert len(told) > 20 and set(told) <= set(stored)
    assert len(stored) == len(set(stored)) and len(stored) - len(told) <= 5  # one in flight at each kill
    assert per_task == 1


# --------------------------------------------------------------------------------------------- versions, rights, removal


def test_a_database_of_the_first_version_opens_with_the_tables_of_a_new_one(tmp_path):
    """With an arena's vote, an attack's, a demonstration's comparison and an own prompt whose id imitates one."""
    folder = tmp_path / "studio"
    folder.mkdir()
    old = connect(folder / FILE)
    old.executescript(f"""
        {schema.SCHEMA} PRAGMA user_version = 1;
        INSERT INTO people (id, pseudonym, role, grp, at) VALUES (1, 'p-1', 'labeler', 'training', 0);
        INSERT INTO failures (who, at) VALUES ('name my password', 0);
        INSERT INTO conversations (id, token, person, grp, mode, policies, how, instructions, at)
          VALUES (5, 'abcdefghijklmnopqrst-v', 1, 'training', 'arena', '[]', '{{}}', '1', 0);
        INSERT INTO messages (id, token, conversation, role, content, state, at) VALUES (7, 'm', 5, 'user', 'hi', 'done', 0);
        INSERT INTO messages (id, token, conversation, role, content, state, at) VALUES (8, 'n', 5, 'assistant', 'x', 'done', 0);
        INSERT INTO tasks (id, key, mode, messages, completions, policies, author, at) VALUES
          (1, 'abcdefghijklmnopqrst-v-1', 'compare', '[1]', '["a", "b"]', '["a", "b"]', 1, 0),
          (2, 'own', 'write', '[1]', '["a"]', NULL, 1, 0), (4, 'against-3', 'write', '[1]', '[]', NULL, 1, 0);
        INSERT INTO leases (id, token, task, person, grp, mode, shown, slot, at, expires)
          VALUES (1, 't', 2, 1, 'training', 'write', '[]', 0, 0, 0);
        INSERT INTO labels (id, lease, task, person, grp, mode, revision, content, instructions, seconds, at)
          VALUES (3, 1, 2, 1, 'training', 'write', 0, '{{"response": "x"}}', '1', 0, 0);
        INSERT INTO tasks (id, key, mode, messages, completions, policies, author, at)
          VALUES (3, 'against-3', 'compare', '[1]', '["a", "b"]', '["person", "b"]', 1, 0);
        INSERT INTO rounds (name, state, at, last_label, last_message) VALUES ('one', 'closed', 0, 3, 8);
    """)
    old.close()
    opened, new = Database(folder), Database(tmp_path / "new")
    tables = "SELECT name, sql FROM sqlite_master ORDER BY name"
    assert [tuple(row) for row in opened.reader.execute(tables)] == [tuple(row) for row in new.reader.execute(tables)]
    found = [tuple(row) for row in opened.reader.execute("SELECT asked, against FROM tasks ORDER BY id")]
    assert found == [(7, None), (None, None), (None, 3), (None, None)]
    assert opened.reader.execute("SELECT count(*) FROM failures").fetchone()[0] == 0
    for database in (opened, new):
        database.close()
    assert Database(folder).path.exists()  # and again


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    Database(tmp_path).close()
    connect(tmp_path / FILE).execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    with pytest.raises(CheckpointError, match="made by a newer version"):
        Database(tmp_path)


def test_the_database_and_its_log_are_for_their_owner_only_in_a_folder_that_was_there(tmp_path):
    folder = tmp_path / "studio"
    folder.mkdir(mode=0o755)
    before = os.umask(0o022)
    try:
        opened = Database(folder)
        joined(opened)
        rights = {each.name: stat.S_IMODE(each.stat().st_mode) for each in [folder, *folder.glob(f"{FILE}*")]}
        opened.close()
    finally:
        os.umask(before)
    assert rights == {"studio": 0o700, FILE: 0o600, f"{FILE}-wal": 0o600, f"{FILE}-shm": 0o600}


def test_a_folder_with_other_things_in_it_keeps_its_rights(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "other").touch()
    Database(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_removed_text_is_in_no_file_any_more(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(2), plan)
    (person,) = joined(database)
    lease = database.now(tasks.lease, person, "write", plan, NOW)
    database.now(labels.record, person, lease.token, 0, {"response": "REMEMBERED" * 900}, plan, NOW)
    database.now(privacy.remove, person.id, NOW)
    database.checkpoint()
    assert not any(b"REMEMBERED" in each.read_bytes() for each in (tmp_path / "studio").iterdir())
    lease = database.now(tasks.lease, other := joined(database)[0], "write", plan, NOW)
    database.now(labels.record, other, lease.token, 0, {"response": "AFTERWARDS"}, plan, NOW)
    database.now(privacy.remove, other.id, NOW)
    database.close()
    assert not any(b"AFTERWARDS" in each.read_bytes() for each in (tmp_path / "studio").iterdir())


# -------------------------------------------------------------------------------------------- what leaves with a round


def test_feedback_that_came_after_the_round_was_begun_is_not_in_it(database, tmp_path):
    (person,) = joined(database)
    token = database.now(conversations.create, person, "chat", ["sft"], {"system": ""}, "1", NOW)
    row = conversations.conversation_of(database.reader, person, token, "chat")
    _, ((answer, _),) = database.now(conversations.ask, row, None, "hello", [("sft", 7)], NOW)
    database.now(conversations.finish, answer, "hi", "done")
    database.now(conversations.give_feedback, person, answer, {"text": "fine"}, NOW)
    database.now(privacy.remember, privacy.scan(database.reader), NOW)
    database.now(rounds._begin, "first", NOW)
    sql = "INSERT INTO feedback (message, person, revision, text, at) VALUES (?, ?, 1, 'call jane.doe@example.org', 0)"
    database.now(lambda connection: connection.execute(sql, (answer, person.id)))
    rounds.finish_all(database, tmp_path / "studio")
    (talk,) = read_rows(tmp_path / "studio" / "rounds" / "first" / "conversations.jsonl")
    assert [each["text"] for each in talk["feedback"]] == ["fine"]


def test_the_audit_leaves_out_what_nobody_has_looked_through(database, tmp_path):
    plan = settings()
    filled(database, tmp_path, candidates(2), plan)
    (person,) = joined(database)
    lease = database.now(tasks.lease, person, "write", plan, NOW)
    database.now(labels.record, person, lease.token, 0, {"response": "not scanned"}, plan, NOW)
    vote(database, person, plan)
    written, judged = (row for row in report.audit(lambda: database.reader) if row["record"] == "label")
    assert written["content"] is None and written["withheld"] and judged["content"]["ranks"] == [0, 1]
    database.now(privacy.remember, privacy.scan(database.reader), NOW)
    rows = [row for row in report.audit(lambda: database.reader) if row["record"] == "label"]
    assert rows[0]["content"] == {"response": "not scanned"}


def talked(database, person, said: str, answer: str, how: dict | None = None) -> int:
    """A conversation with one answer; its row's number."""
    how = {"system": "", "temperature": 0.7, "max_tokens": 9} | (how or {})
    token = database.now(conversations.create, person, "chat", ["sft"], how, "1", NOW)
    row = conversations.conversation_of(database.reader, person, token, "chat")
    _, ((place, _),) = database.now(conversations.ask, row, None, said, [("sft-torch-0", 7)], NOW)
    database.now(conversations.finish, place, answer, "done")
    return row["id"]


def audited(database, kind: str) -> list[dict]:
    database.now(privacy.remember, privacy.scan(database.reader), NOW)
    return [row for row in report.audit(lambda: database.reader) if row["record"] == kind]


def test_the_audit_has_each_message_of_every_branch_with_its_provenance(database):
    (person,) = joined(database)
    talked(database, person, "hello", "[1, 2]", {"system": "be kind"})
    (row,) = database.reader.execute("SELECT * FROM conversations").fetchall()
    asked = database.reader.execute("SELECT id FROM messages WHERE role = 'user'").fetchone()["id"]
    database.now(conversations.ask, row, asked, None, [("sft-torch-0", 8)], NOW + 1)
    (talk,) = audited(database, "conversation")
    assert talk["sampling"] == {"temperature": 0.7, "max_tokens": 9} and talk["system"] == "be kind"
    assert (talk["pseudonym"], talk["grp"], talk["mode"], talk["instructions"]) == (person.pseudonym, "training", "chat", "1")
    question, *answers = audited(database, "message")
    assert (question["role"], question["content"], question["parent"]) == ("user", "hello", None)
    assert [each["parent"] for each in answers] == [question["message"]] * 2 and talk["last"] == answers[1]["message"]
    found = [(each["policy"], each["seed"], each["state"], each["content"], each["at"]) for each in answers]
    assert found == [("sft-torch-0", 7, "done", "[1, 2]", NOW), ("sft-torch-0", 8, "writing", "", NOW + 1)]
    assert {each["conversation"] for each in (question, *answers)} == {talk["conversation"]}
    assert not any("withheld" in each for each in (talk, question, *answers))


@pytest.mark.parametrize("said, system", [("I am jane.doe@example.org", ""), ("hello", "You talk to jane.doe@example.org")])
def test_the_audit_leaves_out_messages_with_personal_data_and_answers_that_may_repeat_it(database, said, system):
    (person,) = joined(database)
    number = talked(database, person, said, "hello jane.doe@example.org", {"system": system})
    talked(database, person, "good morning", "good evening")
    assert "jane" not in json.dumps([audited(database, kind) for kind in ("conversation", "message")])
    assert [each["content"] for each in audited(database, "message")][1:] == [None, "good morning", "good evening"]
    kind, held = ("system", number) if system else ("message", 1)
    database.now(privacy.decide, kind, held, "release", NOW)
    assert audited(database, "message")[1]["content"] == "hello jane.doe@example.org"


def test_the_audit_says_that_removed_messages_were_there_and_nothing_of_what_they_said(database):
    (person,) = joined(database)
    talked(database, person, "my secret garden", "a secret answer", {"system": "a secret system"})
    assert "secret" in json.dumps(list(report.audit(lambda: database.reader)) + audited(database, "message"))
    database.now(privacy.remove, person.id, NOW)
    rows = list(report.audit(lambda: database.reader))
    assert "secret" not in json.dumps(rows)
    left = [(row["role"], row["state"], row["content"]) for row in rows if row["record"] == "message"]
    assert left == [("user", "removed", None), ("assistant", "removed", None)]
