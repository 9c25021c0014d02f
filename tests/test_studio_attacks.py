"""Attacks on what the studio promises: private text, blind votes, screening, limits. Most come from somebody who is signed in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lockstep.errors import CheckpointError, ConfigError
from lockstep.storage.records import read_rows
from lockstep_studio.generator import Piece
from lockstep_studio.pages import talk
from lockstep_studio.pages.arena import shown_replies
from lockstep_studio.store import conversations
from lockstep_studio.store.conversations import MOST_UNFINISHED
from lockstep_studio.store.people import Refused
from studio_server import JSON, Echo, labeler, operator, serving
from test_studio_pages import PERSONAL, waiting_run
from test_studio_store import candidates, settings, write

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
        boss.post("/operator/decide", kind=each["kind"], id=each["id"], decision="release")  # too late
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


# --------------------------------------------------------------------------------------------------------- screening


def gold_items(tmp_path, count: int, completions: int = 2):
    """A file of gold items, which say so: the first answer is the best."""
    rows = [{**row, "id": f"gold{row['id']}", "ranks": list(range(completions))} for row in candidates(count, completions)]
    return str(write(tmp_path / "gold", [{**row, "messages": [{"role": "user", "content": "GOLD"}]} for row in rows], "g.jsonl"))


@contextlib.contextmanager
def screened(tmp_path, count: int, **group):
    """A studio whose members are screened with three gold items, of which there are ``count``."""
    plan = settings(group={"modes": EVERYTHING, "screening": 3, **group}, gold=gold_items(tmp_path, count))
    run, _ = waiting_run(tmp_path, candidates(9))
    with serving(tmp_path / "studio", plan, [run]) as (made, address):
        made.scan, made.policies = lambda: 0, {"a": (run, None), "b": (run, None)}
        yield made, address


def is_gold(task) -> bool:
    return task["messages"][0]["content"] == "GOLD"


def test_before_the_screening_is_passed_no_mode_gives_or_takes_anything_else(tmp_path):
    with screened(tmp_path, 4) as (studio, address):
        client = labeler(studio, address)
        own = client.get("/write/own")["once"]
        for path, fields in {
            "/arena": {}, "/chat": {}, "/attack": {"goal": "g", "category": "hate"},
            "/write/own": {"prompt": "p", "response": "r", "once": own},
        }.items():  # fmt: skip
            refused = client.post(path, **fields)
            assert refused["status"] == 403 and "Your first 3 tasks are in Compare" in refused["error"], path
        assert [client.get(path)["status"] for path in ("/rank", "/write")] == [403, 403]
        for _ in range(3):
            task = client.get("/compare")
            assert is_gold(task)
            client.post(f"/lease/{task['lease']}", choice=next(a["place"] for a in task["answers"] if a["text"].endswith("0")))
        assert client.post("/arena")["status"] == 200 and client.get("/write")["status"] == 200
        assert not is_gold(client.get("/compare"))


def test_skipped_gold_items_count_as_wrong(tmp_path):
    with screened(tmp_path, 6) as (studio, address):
        client = labeler(studio, address)
        for _ in range(3):
            task = client.get("/compare")
            for _ in range(2):  # sent twice
                client.post(f"/lease/{task['lease']}/skip", reason="unclear")
        assert "not for you" in client.get("/compare")["error"]


def test_when_the_gold_items_have_run_out_there_are_no_other_tasks(tmp_path):
    with screened(tmp_path, 3, screening_accuracy=0.0) as (studio, address):
        client = labeler(studio, address)
        for _ in range(2):
            client.post(f"/lease/{client.get('/compare')['lease']}", choice=0)
        studio.database.now(lambda connection: connection.execute(
            "UPDATE tasks SET gold = NULL WHERE id NOT IN (SELECT task FROM leases)"
        ))  # fmt: skip
        refused = client.get("/compare")
        assert refused["status"] == 403 and "1 are missing. Tell the operator" in refused["error"]


def test_a_screening_with_too_few_gold_items_does_not_start(tmp_path):
    with pytest.raises(ConfigError, match="groups.training.screening is 3, but 'gold' has 2 items"), screened(tmp_path, 2):
        pass


def test_a_gold_item_whose_time_ran_out_comes_again(tmp_path):
    with screened(tmp_path, 3) as (studio, address):
        client, real = labeler(studio, address), studio.clock
        for hours in range(4):
            studio.clock = lambda hours=hours: real() + 3600 * hours
            assert is_gold(client.get("/compare"))


def test_nothing_on_a_page_falls_with_real_tasks_only(tmp_path):
    """Nor do gold items come where no others are left: they would be known by that."""
    group = {"modes": ["compare"], "checks_share": 0.5, "checks_accuracy": 0.0}  # else ten guesses of gold items may end it
    plan = settings(group=group, gold=gold_items(tmp_path, 20))
    run, _ = waiting_run(tmp_path, candidates(6))
    with serving(tmp_path / "studio", plan, [run]) as (studio, address):
        studio.scan = lambda: 0
        client, seen = labeler(studio, address), []
        while (task := client.get("/compare"))["lease"] is not None:
            seen.append(is_gold(task))
            assert {*task} == {"mode", "lease", "revision", "messages", "reasons", "done", "undo", "answers", "csrf", "status"}
            assert client.get("/")["modes_here"][0]["left"] is (seen.count(False) < 6)
            client.post(f"/lease/{task['lease']}", choice=0)
        assert seen.count(False) == 6 and seen[-1] is False


# ------------------------------------------------------------------------------------------------------- blind votes


class Broken(Echo):
    """A policy 'ppo' that cannot answer, and names itself when it says so."""

    let = True

    def speak(self, requests):
        if self.policy.startswith("ppo") and Broken.let:
            raise CheckpointError(f"The policy {self.policy} is damaged.")
        return super().speak(requests)


@pytest.mark.parametrize("mode", ["arena", "attack"])
def test_answers_that_failed_are_not_judged_but_drawn_again_and_do_not_name_their_policy(studio, mode):
    studio.generator._open, Broken.let = Broken, True
    studio.policies = {"ppo-torch-1": (studio.folder, None)} if mode == "attack" else studio.policies
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    client.get(f"/{mode}")
    token = client.post(f"/{mode}", goal="g", category="hate")["conversation"]
    headers = {"accept": "text/event-stream", "x-csrf-token": client.csrf}
    said = client.client.post(f"/{mode}/{token}/say", json={"text": "hello"}, headers=headers).text
    assert "failed" in said and "ppo" not in said and "damaged" not in said
    page = client.get(f"/{mode}/{token}")
    assert page["spoilt"] and "ppo" not in json.dumps(page)
    choose = "vote" if mode == "arena" else "choose"
    refused = client.post(f"/{mode}/{token}/{choose}", choice=0)
    assert refused["status"] == 409 and "cannot be compared" in refused["error"]
    Broken.let = False
    assert client.post(f"/{mode}/{token}/again")["status"] == 200
    assert client.post(f"/{mode}/{token}/again")["status"] == 409  # they are whole now
    assert client.post(f"/{mode}/{token}/{choose}", choice=0)["status"] == 200
    assert '"completions":["",' not in closed(studio, boss).replace(" ", "")


def test_where_the_queue_takes_one_of_two_answers_neither_is_written(studio):
    client, submit, tickets = labeler(studio, studio.address), studio.generator.submit, []

    def full(request):
        if tickets:
            raise Refused("Too many people are waiting for an answer.", 503)
        tickets.append(submit(request))
        return tickets[-1]

    studio.generator.submit = full
    client.get("/arena")
    token = client.post("/arena")["conversation"]
    assert client.post(f"/arena/{token}/say", text="forever")["status"] == 503
    assert tickets[0].cancelled
    studio.generator.submit = submit
    assert client.get(f"/arena/{token}")["spoilt"]
    assert client.post(f"/arena/{token}/vote", choice=0)["status"] == 409


def test_stopped_answers_are_not_judged(studio):
    client = labeler(studio, studio.address)
    client.get("/arena")
    token = client.post("/arena")["conversation"]
    headers = {"accept": "text/event-stream", "x-csrf-token": client.csrf}
    with client.client.stream("POST", f"/arena/{token}/say", json={"text": "forever"}, headers=headers) as response:
        next(response.iter_lines())
    until = time.time() + 60
    while client.get(f"/arena/{token}")["answers"][0]["state"] == "writing" and time.time() < until:
        time.sleep(0.05)
    assert client.post(f"/arena/{token}/vote", choice=0)["status"] == 409
    page = labeler_page(client, studio, f"/arena/{token}")
    assert f"/arena/{token}/again" in page and 'name="choice"' not in page


def labeler_page(client, studio, path: str) -> str:
    return client.client.get(path, headers={"accept": "text/html"}).text


class Slow(Echo):
    """A policy 'sft' that takes a while to load; when the latest was loaded."""

    loaded = 0.0

    def __init__(self, policy):
        if policy.startswith("sft"):
            time.sleep(0.5)
            Slow.loaded = time.perf_counter()
        super().__init__(policy)


def test_which_of_two_policies_is_loaded_cannot_be_seen(studio):
    """The first piece of each comes when both have begun; the wait is of both."""
    studio.generator._open = Slow
    client = labeler(studio, studio.address)
    for _ in range(3):
        studio.generator._speakers.clear()
        client.get("/arena")
        token = client.post("/arena")["conversation"]
        headers = {"accept": "text/event-stream", "x-csrf-token": client.csrf}
        times: dict[int, float] = {}
        with client.client.stream("POST", f"/arena/{token}/say", json={"text": "one two"}, headers=headers) as response:
            name = ""
            for line in response.iter_lines():
                name = line.removeprefix("event: ") if line.startswith("event: ") else name
                if line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    assert name != "wait" or data["side"] == 0
                    if name in ("piece", "end"):
                        times.setdefault(data["side"], time.perf_counter())
        assert Slow.loaded < min(times.values()) and len(times) == 2


def test_answers_come_a_piece_of_each_at_a_time_whoever_is_quicker():
    one, other = [Piece("a"), Piece("b"), Piece("c", "done")], [Piece("x"), Piece("y", "done")]

    async def arriving():
        for piece in (Piece(ahead=0), *one):
            yield 1, piece
        yield 0, Piece(ahead=3)
        for piece in other:
            yield 0, piece

    async def seen():
        return [(side, piece.text, piece.ahead) async for side, piece in talk._even(arriving(), 2)]

    expected = [(0, "", 3), (0, "x", None), (1, "a", None), (0, "y", None), (1, "b", None), (1, "c", None)]
    assert asyncio.run(seen()) == expected


def test_an_answer_that_ends_first_is_not_shown_before_the_other():
    row = {"side": 0, "content": "mine", "state": "done"}
    other = {"side": 1, "content": "", "state": "writing"}
    assert [each["state"] for each in shown_replies([row, other])] == ["writing", "writing"]
    assert [each["text"] for each in shown_replies([row, other])] == ["", ""]
    assert [each["text"] for each in shown_replies([row, {**other, "state": "done"}])] == ["mine", ""]


@pytest.mark.parametrize("first", ["compare", "adjudicate"])
def test_whoever_sees_what_others_chose_does_not_choose_themselves(tmp_path, first):
    plan = settings(group={"modes": ["compare", "adjudicate"], "overlap_share": 1.0, "overlap": 3})
    run, _ = waiting_run(tmp_path, candidates(1))
    with serving(tmp_path / "studio", plan, [run]) as (studio, address):
        studio.scan = lambda: 0
        client = labeler(studio, address)
        mine = client.get("/compare")["lease"] if first == "compare" else None
        for favourite in "01":
            other = labeler(studio, address)
            task = other.get("/compare")
            place = next(answer["place"] for answer in task["answers"] if answer["text"].endswith(favourite))
            other.post(f"/lease/{task['lease']}", choice=place)
        if mine:
            assert client.get("/adjudicate")["lease"] is None
            assert client.post(f"/lease/{mine}", choice=0)["status"] == 200
        else:
            assert client.get("/adjudicate")["lease"] is not None
            assert client.get("/compare")["lease"] is None


def test_a_vote_after_the_others_choices_were_shown_is_refused(tmp_path):
    """As where the two leases are from before they excluded each other."""
    plan = settings(group={"modes": ["compare", "adjudicate"]})
    run, _ = waiting_run(tmp_path, candidates(1))
    with serving(tmp_path / "studio", plan, [run]) as (studio, address):
        client = labeler(studio, address)
        task = client.get("/compare")
        studio.database.now(lambda connection: connection.execute(
            "INSERT INTO leases (token, task, person, grp, mode, shown, slot, at, expires) "
            "SELECT 'x', task, person, grp, 'adjudicate', shown, 0, at, expires FROM leases"
        ))  # fmt: skip
        assert client.post(f"/lease/{task['lease']}", choice=0)["status"] == 409
        assert client.post(f"/lease/{task['lease']}/skip")["status"] == 200


# ------------------------------------------------------------------------------------------------- limits, many at once


def at_once(client, count: int, path: str, **fields) -> list[int]:
    def send(_):
        body, cookies = {"csrf": client.csrf, **fields}, dict(client.client.cookies)
        return httpx.post(
            client.client.base_url.join(f"/{path}"), json=body, cookies=cookies, headers=JSON, timeout=30
        ).status_code

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(send, range(count)))


def test_answers_that_are_asked_for_at_once_are_no_more_than_the_limits(tmp_path):
    plan = settings(group={"modes": EVERYTHING}, limits={"answers_per_minute": 6})
    with serving(tmp_path / "studio", plan, opened=lambda policy: Echo(policy, 0.2)) as (studio, address):
        studio.scan, studio.policies = lambda: 0, {"a": (tmp_path, None), "b": (tmp_path, None)}
        client = labeler(studio, address)
        client.get("/chat")
        talk = client.post("/chat")["conversation"]
        assert at_once(client, 9, f"chat/{talk}/say", text="hi").count(200) == MOST_UNFINISHED
        assert at_once(client, 9, f"chat/{talk}/say", text="hi").count(200) == 6 - MOST_UNFINISHED


@pytest.mark.parametrize("mode", ["arena", "attack"])
def test_a_turn_that_is_sent_several_times_at_once_is_one(studio, mode):
    client = labeler(studio, studio.address)
    client.get(f"/{mode}")
    token = client.post(f"/{mode}", goal="g", category="hate")["conversation"]
    assert sorted(at_once(client, 4, f"{mode}/{token}/say", text="hi")) == [200, 409, 409, 409]
    sql = "SELECT count(*) FROM messages WHERE role = 'user'"
    assert studio.database.reader.execute(sql).fetchone()[0] == 1


def test_a_conversation_has_an_end(tmp_path):
    limits = {"conversation_messages": 5, "conversation_characters": 1000, "text_characters": 1500}
    with serving(tmp_path / "studio", settings(limits=limits)) as (studio, address):
        studio.scan, studio.policies = lambda: 0, {"a": (tmp_path, None)}
        client = labeler(studio, address)
        for text, turns in (("hi", 2), ("x" * 1200, 1)):
            client.get("/chat")
            talk = client.post("/chat")["conversation"]
            statuses = [client.post(f"/chat/{talk}/say", text=text) for _ in range(turns + 1)]
            assert [each["status"] for each in statuses] == [200] * turns + [409]
            assert "as long as one may be" in statuses[-1]["error"]


def test_of_a_conversation_that_is_longer_than_it_may_be_the_end_is_shown(tmp_path):
    """It began under other settings."""
    limits = {"conversation_messages": 6, "conversation_characters": 1000, "text_characters": 500}
    with serving(tmp_path / "studio", settings(limits=limits)) as (studio, address):
        studio.scan, studio.policies = lambda: 0, {"a": (tmp_path, None)}
        client = labeler(studio, address)
        talk = asked(client, "chat", "hello")

        def fill(connection, length):
            (number,) = connection.execute("SELECT id FROM conversations").fetchone()
            parent = None
            for i in range(9):
                role = "user" if i % 2 == 0 else "assistant"
                parent, _ = conversations.add_message(connection, number, parent, role, f"{i}" * length, 0.0)
            conversations.set_head(connection, number, parent)

        studio.database.now(fill, 1)
        assert [each["text"] for each in client.get(f"/chat/{talk}")["thread"]] == list("345678")
        studio.database.now(fill, 400)
        assert [each["text"][0] for each in client.get(f"/chat/{talk}")["thread"]] == list("678")


def test_what_is_stored_of_a_person_in_a_day_is_bounded(tmp_path):
    plan = settings(group={"modes": EVERYTHING}, limits={"characters_per_day": 3000})
    with serving(tmp_path / "studio", plan) as (studio, address):
        studio.scan, studio.policies = lambda: 0, {"a": (tmp_path, None), "b": (tmp_path, None)}
        client, other = labeler(studio, address), labeler(studio, address)
        statuses = []
        for _ in range(4):
            own = client.get("/write/own")["once"]
            statuses.append(client.post("/write/own", prompt="p" * 500, response="r" * 500, once=own)["status"])
        assert statuses == [200, 200, 429, 429]
        client.get("/chat")
        while client.post("/chat")["status"] == 200:
            pass
        assert asked(other, "chat", "hello")
        sql = "SELECT characters FROM written ORDER BY person"
        first, second = (row["characters"] for row in studio.database.reader.execute(sql))
        assert first <= 3000 and second > len("hello")
        real = studio.clock
        studio.clock = lambda: real() + 86400
        assert client.post("/chat")["status"] == 200


def test_a_form_for_an_own_prompt_is_one_that_we_gave_to_this_person(studio):
    client, other = labeler(studio, studio.address), labeler(studio, studio.address)
    other.get("/write/own")
    theirs = other.get("/write/own")["once"]
    client.get("/write/own")
    for once in ("0-zz", "against-1", "1-" + "a" * 22, "\u00b2-x", theirs, theirs[:-1], ""):
        assert client.post("/write/own", prompt="p", response="r", once=once)["status"] == 400, once
    real = studio.clock
    once = client.get("/write/own")["once"]
    studio.clock = lambda: real() + 60
    client.post("/write/own", prompt="p", response="r", once=once)
    (seconds,) = studio.database.reader.execute("SELECT seconds FROM labels").fetchone()
    assert 58 < seconds < 70


# --------------------------------------------------------------------------------------------- closed, removed, strange


def test_a_conversation_in_a_closed_round_takes_nothing_more(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    talk = asked(client, "chat", "before")
    answer = client.get(f"/chat/{talk}")["thread"][1]["message"]
    closed(studio, boss)
    for path, fields in {f"/chat/{talk}/say": {"text": "after"}, f"/chat/{talk}/again": {"message": answer},
                         f"/feedback/{answer}": {"thumb": 1}}.items():  # fmt: skip
        refused = client.post(path, **fields)
        assert refused["status"] == 409 and "Begin a new one" in refused["error"], path
    page = labeler_page(client, studio, f"/chat/{talk}")
    assert "is in a closed round" in page and f"/chat/{talk}/say" not in page


def test_the_tasks_of_somebody_who_had_their_work_removed_end_for_the_others(studio):
    author, other, boss = labeler(studio, studio.address), labeler(studio, studio.address), operator(studio, studio.address)
    for _ in range(2):
        author.post(f"/lease/{author.get('/write')['lease']}", response="mine")
    studio.database.now(lambda connection: connection.execute("UPDATE slots SET open = 0"))
    boss.get("/operator")
    assert boss.post("/operator/against")["new"] == 2
    done = other.get("/compare")["lease"]
    other.post(f"/lease/{done}", choice=0)
    held = other.get("/compare")["lease"]
    author.get("/me")
    author.post("/me/remove", sure="yes")
    assert other.get("/compare")["lease"] is None
    assert other.post(f"/lease/{held}", choice=0)["status"] == 410
    assert [other.get(f"/lease/{lease}")["status"] for lease in (done, held)] == [410, 410]
    assert other.post(f"/lease/{held}/skip")["status"] == 410


def test_a_removed_persons_own_tasks_are_free_for_others(studio):
    author, other = labeler(studio, studio.address), labeler(studio, studio.address)
    author.get("/compare")
    author.get("/me")
    author.post("/me/remove", sure="yes")
    found = set()
    while (task := other.get("/compare"))["lease"] is not None:
        found.add(task["messages"][0]["content"])
        other.post(f"/lease/{task['lease']}", choice=0)
    assert len(found) == 6


@pytest.mark.parametrize("place", ["%C2%B2", "9" * 5000, "-1", "1e1", "%D9%A1"])
def test_a_place_that_is_none_is_no_place(studio, place):
    assert labeler(studio, studio.address).get(f"/write?place={place}")["place"] is None


@pytest.mark.parametrize("flags", [[["a"]], [{}], [None], [1]])
def test_a_flag_that_is_none_is_refused(tmp_path, flags):
    run, _ = waiting_run(tmp_path, candidates(1, 3))
    with serving(tmp_path / "studio", settings(group={"modes": ["rank"]}), [run]) as (studio, address):
        client = labeler(studio, address)
        lease = client.get("/rank")["lease"]
        assert client.post(f"/lease/{lease}/judge", place=0, rating=1, flags=flags)["status"] == 400


def test_answers_of_which_some_were_judged_alone_are_ranked_without_ratings(tmp_path):
    run, _ = waiting_run(tmp_path, candidates(1, 3))
    with serving(tmp_path / "studio", settings(group={"modes": ["rank"]}, judge_alone=False), [run]) as (studio, address):
        client = labeler(studio, address)
        lease = client.get("/rank")["lease"]
        client.post(f"/lease/{lease}/judge", place=0, rating=3)
        assert client.post(f"/lease/{lease}", ranks=[1, 2, 3])["status"] == 200
        assert "ratings" not in json.loads(studio.database.reader.execute("SELECT content FROM labels").fetchone()[0])


def test_a_temperature_of_a_thousand_digits_is_refused(studio):
    client = labeler(studio, studio.address)
    client.get("/chat")
    assert client.post("/chat", temperature=10**400)["status"] == 400


def test_a_clock_that_was_set_back_gives_no_negative_seconds(studio):
    client, real = labeler(studio, studio.address), studio.clock
    lease, own = client.get("/compare")["lease"], client.get("/write/own")["once"]
    studio.clock = lambda: real() - 3600
    client.post(f"/lease/{lease}", choice=0)
    client.post("/write/own", prompt="p", response="r", once=own)
    assert [row["seconds"] for row in studio.database.reader.execute("SELECT seconds FROM labels")] == [0.0, 0.0]


HIDDEN = "good\u202edab\u200b"


def test_hidden_characters_are_spelled_out_while_an_answer_streams_and_where_it_is_edited(studio):
    client = labeler(studio, studio.address)
    client.get("/chat")
    talk = client.post("/chat")["conversation"]
    headers = {"accept": "text/event-stream", "x-csrf-token": client.csrf}
    streamed = client.client.post(f"/chat/{talk}/say", json={"text": HIDDEN}, headers=headers).text
    said = "".join(json.loads(line.removeprefix("data: ")).get("text", "") for line in streamed.splitlines() if "data" in line)
    assert "good\\u202edab" in said
    answer = client.get(f"/chat/{talk}")["thread"][1]["message"]
    client.post(f"/feedback/{answer}", text=HIDDEN)
    token = asked(client, "attack", HIDDEN, goal=HIDDEN, category="hate")
    for path in (f"/chat/{talk}", f"/attack/{token}", "/attack", "/chat"):
        page = labeler_page(client, studio, path)
        assert "\u202e" not in page and "\\u202e" in page, path


def test_an_answer_that_is_mended_begins_with_what_is_hidden_in_it(tmp_path):
    rows = [{**candidates(1)[0], "completions": [HIDDEN, HIDDEN]}]
    run, _ = waiting_run(tmp_path, rows)
    with serving(tmp_path / "studio", settings(group={"modes": ["write"]}), [run]) as (studio, address):
        client = labeler(studio, address)
        lease = client.get("/write")["lease"]
        page = labeler_page(client, studio, "/write?place=0")
        assert "\u202e" not in page and "good\\u202edab\\u200b</textarea>" in page
        same = client.post(f"/lease/{lease}", response="good\\u202edab\\u200b", place=0)
        assert same["status"] == 400 and "as it was" in same["error"]


def test_a_task_with_half_a_character_is_named_and_the_studio_starts(tmp_path):
    run, file = waiting_run(tmp_path, candidates(2))
    file.write_text(file.read_text().replace("answer 0.0", "half \\ud800"))
    with serving(tmp_path / "studio", settings(), [run]) as (studio, _):
        assert "line 1" in studio.problem and "surrogates not allowed" in studio.problem
        file.write_text(file.read_text().replace("half \\ud800", "whole \\ud83d\\ude00"))
        assert studio.scan() == 2
