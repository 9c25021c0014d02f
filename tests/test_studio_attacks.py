"""Attacks on what the studio promises: private text, blind votes, screening, limits. Most come from somebody who is signed in."""

from __future__ import annotations

import pytest

from lockstep.storage.records import read_rows
from studio_server import labeler, operator, serving
from test_studio_pages import PERSONAL, waiting_run
from test_studio_store import candidates, settings

EVERYTHING = ["compare", "rank", "chat", "arena", "attack", "write"]


@pytest.fixture
def studio(tmp_path):
    """Six pairs, two policies; everybody may do everything but adjudicate."""
    plan = settings(group={"modes": EVERYTHING}, attack={"turns": 3}, chat={"allowed": ["policy", "system"]})
    run, file = waiting_run(tmp_path, candidates(6))
    with serving(tmp_path / "studio", plan, [run]) as (made, address):
        made.policies = {"sft-torch-0": (run, None), "ppo-torch-1": (run, None)}
        made.scan = lambda: 0
        made.address, made.file = address, file
        yield made


def closed(studio, boss, name: str = "first") -> str:
    """All files of the round that the operator closes now."""
    boss.get("/operator")
    assert boss.post("/operator/close", name=name)["status"] == 200
    folder = studio.folder / "rounds" / name
    return "".join(file.read_text() for file in sorted(folder.glob("*.jsonl")))


def asked(client, mode: str, text: str, **begin) -> str:
    """A conversation in which ``text`` was said and answered."""
    client.get(f"/{mode}")
    token = client.post(f"/{mode}", **begin)["conversation"]
    assert client.post(f"/{mode}/{token}/say", text=text)["status"] == 200
    return token


# ------------------------------------------------------------------------------------------------------ private text


def own_prompt(client, text):
    own = client.get("/write/own")
    client.post("/write/own", prompt=text, response="fine", once=own["once"])


def duel(client, text):
    client.post(f"/arena/{asked(client, 'arena', text)}/vote", choice=0)


def attacked(client, text):
    token = asked(client, "attack", text, goal="a goal", category="hate")
    client.post(f"/attack/{token}/choose", choice=1)
    client.post(f"/attack/{token}/finish", success=1)


def system(client, text):
    asked(client, "chat", "hello", system=text)


@pytest.mark.parametrize("say", [own_prompt, duel, attacked, system])
def test_what_people_write_anywhere_leaves_only_once_the_operator_released_it(studio, say):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    say(client, PERSONAL)
    say(client, "Nothing about anybody")
    assert "jane.doe" not in closed(studio, boss)
    found = boss.get("/operator")
    assert {PERSONAL} == {each["text"] for each in found["held"]} and found["next"]["held_back"] > 0
    for each in found["held"]:
        boss.post("/operator/decide", kind=each["kind"], id=each["id"], decision="release")
    assert "jane.doe" in closed(studio, boss, "second")


@pytest.mark.parametrize("say", [own_prompt, duel, attacked, system])
def test_what_the_operator_withholds_never_leaves(studio, say):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    say(client, PERSONAL)
    for each in boss.get("/operator")["held"]:
        boss.post("/operator/decide", kind=each["kind"], id=each["id"], decision="withhold")
    assert {*boss.get("/operator")["next"].values()} <= {0, 1, 2}
    say(client, "Nothing about anybody")
    assert "jane.doe" not in closed(studio, boss)


def test_the_turns_before_a_private_one_may_leave(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    token = asked(client, "attack", "harmless", goal="a goal", category="hate")
    client.post(f"/attack/{token}/choose", choice=1)
    client.post(f"/attack/{token}/say", text=PERSONAL)
    client.post(f"/attack/{token}/choose", choice=1)
    closed(studio, boss)
    (row,) = read_rows(studio.folder / "rounds" / "first" / "comparisons.jsonl")
    assert row["messages"] == [{"role": "user", "content": "harmless"}]


def test_the_operators_own_system_message_is_not_held_back(tmp_path):
    with serving(tmp_path / "studio", settings(chat={"system": PERSONAL})) as (studio, address):
        studio.policies = {"sft": (tmp_path, None)}
        studio.scan = lambda: 0
        asked(labeler(studio, address), "chat", "hello")
        boss = operator(studio, address)
        assert boss.get("/operator")["held"] == [] and PERSONAL in closed(studio, boss)


def test_a_demonstration_that_is_withheld_later_takes_its_comparison_with_it(studio):
    author, other, boss = labeler(studio, studio.address), labeler(studio, studio.address), operator(studio, studio.address)
    author.post(f"/lease/{author.get('/write')['lease']}", response=PERSONAL)
    (held,) = boss.get("/operator")["held"]
    boss.post("/operator/decide", kind="label", id=held["id"], decision="release")
    studio.database.now(lambda connection: connection.execute("UPDATE slots SET open = 0"))
    assert boss.post("/operator/against")["new"] == 1
    other.post(f"/lease/{other.get('/compare')['lease']}", choice=0)
    assert boss.get("/operator")["next"]["comparisons"] == 1
    boss.post("/operator/decide", kind="label", id=held["id"], decision="withhold")
    assert boss.get("/operator")["next"]["comparisons"] == 0


def test_removing_ones_work_empties_the_databases_log(studio):
    client = labeler(studio, studio.address)
    own_prompt(client, "UNFORGETTABLE")
    client.get("/me")
    client.post("/me/remove", sure="yes")
    assert not any(b"UNFORGETTABLE" in each.read_bytes() for each in studio.folder.iterdir() if each.is_file())
