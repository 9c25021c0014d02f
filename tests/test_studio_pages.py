"""The studio's pages as people and machines see them: modes from the first task to the frozen round."""

from __future__ import annotations

import json
import re

import pytest

from lockstep.data.labels import candidates_in, labels_in
from lockstep.storage.records import read_rows
from lockstep_studio.pages.rank import FLAGS, dense
from studio_server import Browser, Machine, labeler, operator, serving
from test_studio_store import candidates, settings, write

PERSONAL = "Write to jane.doe@example.org"


def waiting_run(tmp_path, rows):
    """A run whose stage waits for labels of these rows."""
    run, stage = tmp_path / "runs" / "mine", tmp_path / "runs" / "stages" / "collect_1-torch-abc"
    run.mkdir(parents=True)
    record = {"name": "mine", "experiment": "x", "seed": 0, "status": "running", "backend": {"name": "torch"}}
    stages = {"collect_1": {"folder": f"stages/{stage.name}", "status": "running"}}
    (run / "run.json").write_text(json.dumps({**record, "stages": stages}))
    return run, write(stage, rows)


@pytest.fixture
def studio(tmp_path):
    """A studio with six pairs and four tasks of three answers, and two policies; everybody may do everything."""
    rows = [*candidates(6), *({**row, "id": f"rank{row['id']}"} for row in candidates(4, 3))]
    modes = ["compare", "rank", "chat", "arena", "attack", "write", "adjudicate"]
    plan = settings(group={"modes": modes}, attack={"turns": 2}, chat={"max_tokens": 9})
    run, file = waiting_run(tmp_path, rows)
    with serving(tmp_path / "studio", plan, [run]) as (made, address):
        made.policies = {"ppo_1-torch-0": (run, "ppo_1"), "ppo_1-torch-1": (run, "ppo_1")}
        made.scan = lambda: 0
        made.address, made.file = address, file
        yield made


def judged(client, ratings=(3, 4, 5)):
    """Judge every answer of the present ranking alone, and return the task as it is then."""
    for rating in ratings:
        task = client.get("/rank")
        (answer,) = task["answers"]
        client.post(f"/lease/{task['lease']}/judge", place=answer["place"], rating=rating, flags=["opinion"])
    return client.get("/rank")


# ---------------------------------------------------------------------------------------------------------- compare


def test_nothing_that_gives_a_policy_away_reaches_a_labeler_before_the_vote(studio):
    for kind in (Machine, Browser):
        client = labeler(studio, studio.address, kind=kind)
        shown = json.dumps(client.get("/compare")) + json.dumps(client.get("/rank")) + json.dumps(client.get("/write"))
        for secret in ("ppo_1", "torch", "scores", "policies", "seed", "truth", "secret", "gold", "probability"):
            assert secret not in shown, secret


def test_the_names_come_with_the_vote_in_the_order_on_the_screen(studio):
    client = labeler(studio, studio.address)
    task = client.get("/compare")
    assert sorted(task["answers"][0]) == ["place", "text"]
    saved = client.post(f"/lease/{task['lease']}", choice=1)
    expected = [f"ppo_1-torch-{answer['text'][-1]}" for answer in task["answers"]]
    assert saved["names"] == expected
    assert [each["name"] for each in client.get(f"/lease/{task['lease']}")["answers"]] == expected


def test_the_sides_are_drawn_anew_for_every_task(studio):
    client, firsts = labeler(studio, studio.address), set()
    for person in range(4):
        client = labeler(studio, studio.address)
        for _ in range(1 if person < 3 else 3):
            task = client.get("/compare")
            firsts.add(task["answers"][0]["text"][-1])
            client.post(f"/lease/{task['lease']}/skip", reason="unclear")
    # six draws: both sides, but for one chance in 32; more people make that smaller
    for _ in range(12):
        firsts.add(labeler(studio, studio.address).get("/compare")["answers"][0]["text"][-1]) if len(firsts) < 2 else None
    assert firsts == {"0", "1"}


@pytest.mark.parametrize(
    ("choice", "ranks", "bad"), [(0, "first", False), (1, "second", False), ("tie", [0, 0], False), ("bad", [0, 0], True)]
)
def test_a_choice_on_the_screen_becomes_ranks_of_the_completions(studio, choice, ranks, bad):
    client = labeler(studio, studio.address)
    task = client.get("/compare")
    client.post(f"/lease/{task['lease']}", choice=choice)
    if isinstance(ranks, str):
        best = int(task["answers"][choice]["text"][-1])
        ranks = [0, 1] if best == 0 else [1, 0]
    content = json.loads(studio.database.reader.execute("SELECT content FROM labels").fetchone()[0])
    assert (content["ranks"], content["both_bad"]) == (ranks, bad)


@pytest.mark.parametrize("choice", [2, -1, "left", None, [], {"a": 1}, 0.5, True, "9" * 30])
def test_a_choice_that_is_none_is_refused_and_nothing_is_stored(studio, choice):
    client = labeler(studio, studio.address)
    task = client.get("/compare")
    assert client.post(f"/lease/{task['lease']}", choice=choice)["status"] == 400
    assert studio.database.reader.execute("SELECT count(*) FROM labels").fetchone()[0] == 0


def test_an_answer_that_says_its_name_is_marked_not_blind(studio):
    studio.policies = {**studio.policies, "answer 0.1": (studio.folder, None)}
    client = labeler(studio, studio.address)
    blind = {}
    for _ in range(6):
        task = client.get("/compare")
        client.post(f"/lease/{task['lease']}", choice="tie")
    for row in studio.database.reader.execute("SELECT key, content FROM labels JOIN tasks ON tasks.id = task"):
        blind[row["key"]] = json.loads(row["content"])["blind"]
    assert blind == {f"{i:06d}": i != 0 for i in range(6)}


def test_a_browser_votes_with_plain_forms(studio):
    client = labeler(studio, studio.address, kind=Browser)
    page = client.get("/compare")
    lease = re.search(r"/lease/([\w-]+)", page)[1]
    response = client.post(f"/lease/{lease}", choice="0", revision="0")
    assert "Saved. Who wrote what" in response.text and "ppo_1-torch-" in response.text


# ------------------------------------------------------------------------------------------------------------- rank


def test_answers_are_judged_alone_before_all_are_seen(studio):
    client = labeler(studio, studio.address)
    first = client.get("/rank")
    assert first["step"] == "judge" and len(first["answers"]) == 1 and list(first["flags"]) == list(FLAGS) and len(FLAGS) == 11
    early = client.post(f"/lease/{first['lease']}", ranks=[1, 2, 3])
    assert early["status"] == 409 and "Judge each answer alone first" in early["error"]
    task = judged(client)
    assert task["step"] == "rank" and len(task["answers"]) == 3


def test_ranks_and_ratings_are_stored_in_the_order_of_the_completions(studio):
    client = labeler(studio, studio.address)
    task = judged(client, (1, 4, 7))
    order = [int(answer["text"][-1]) for answer in task["answers"]]
    client.post(f"/lease/{task['lease']}", ranks=[2, 1, 2])
    content = json.loads(studio.database.reader.execute("SELECT content FROM labels").fetchone()[0])
    assert [content["ranks"][index] for index in order] == [1, 0, 1]
    assert [content["ratings"][index] for index in order] == [1, 4, 7]
    assert content["flags"] == [["opinion"]] * 3


def test_ranks_begin_at_0_without_gaps():
    assert dense([3, 1, 3]) == [1, 0, 1] and dense([2, 2]) == [0, 0]


def test_a_ranking_can_be_changed_until_its_round_is_closed(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    task = judged(client)
    client.post(f"/lease/{task['lease']}", ranks=[1, 2, 3])
    undo = client.get("/rank")["undo"]
    again = client.get(f"/lease/{undo}")
    assert again["revision"] == 1 and again["given"] == [1, 2, 3]
    assert client.post(f"/lease/{undo}", ranks=[3, 2, 1], revision=1)["status"] == 200
    boss.get("/operator")
    boss.post("/operator/close", name="first")
    assert client.get(f"/lease/{undo}")["status"] == 409
    (row,) = [row for row in read_rows(studio.folder / "rounds" / "first" / "comparisons.jsonl") if row["mode"] == "rank"]
    assert row["revision"] == 1


def test_the_same_request_sent_twice_is_answered_alike(studio):
    client = labeler(studio, studio.address)
    task = client.get("/compare")
    answers = [client.post(f"/lease/{task['lease']}", choice=0, revision=0) for _ in range(2)]
    assert answers[0] == answers[1] and answers[0]["status"] == 200
    assert client.post(f"/lease/{task['lease']}", choice=1, revision=0)["status"] == 409


def test_a_comparison_offers_no_way_back_since_the_names_were_shown(studio):
    client = labeler(studio, studio.address, kind=Browser)
    lease = re.search(r'action="/lease/([\w-]+)"', client.get("/compare"))[1]
    client.post(f"/lease/{lease}", choice=0)
    page = client.get("/compare")
    assert "1 done" in page and "Change my last answer" not in page and "/lease/compare" not in page


# ------------------------------------------------------------------------------------------------ write, adjudicate


def test_a_demonstration_is_written_or_mended_and_frozen(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    task = client.get("/write")
    same = client.post(f"/lease/{task['lease']}", response=task["answers"][0]["text"], place=0)
    assert same["status"] == 400 and "as it was" in same["error"]
    client.post(f"/lease/{task['lease']}", response="A better answer.", place=0)
    own = client.get("/write/own")
    for _ in range(2):  # sent twice
        client.post("/write/own", prompt="What is a wug?", response="A bird.", once=own["once"])
    boss.get("/operator")
    boss.post("/operator/close", name="first")
    rows = list(read_rows(studio.folder / "rounds" / "first" / "demonstrations.jsonl"))
    assert [(row["response"], row["mended"] is not None) for row in rows] == [("A better answer.", True), ("A bird.", False)]
    assert rows[1]["messages"] == [{"role": "user", "content": "What is a wug?"}]


def test_a_demonstration_is_compared_with_an_answer_but_never_by_its_author(tmp_path):
    plan = settings(group={"modes": ["compare", "write"]})
    run, _ = waiting_run(tmp_path, candidates(1))
    with serving(tmp_path / "studio", plan, [run]) as (studio, address):
        author, other, boss = labeler(studio, address), labeler(studio, address), operator(studio, address)
        author.post(f"/lease/{author.get('/write')['lease']}", response="What I would say.")
        author.post(f"/lease/{author.get('/compare')['lease']}", choice=0)
        boss.get("/operator")
        assert [boss.post("/operator/against")["new"] for _ in range(2)] == [1, 0]
        assert author.get("/compare")["lease"] is None
        task = other.get("/compare")
        mine = next(answer["place"] for answer in task["answers"] if answer["text"] == "What I would say.")
        names = other.post(f"/lease/{task['lease']}", choice=mine)["names"]
        assert names[mine] == "person" and names[1 - mine].startswith("ppo_1-torch-")
        author.get("/me")
        author.post("/me/remove", sure="yes")
        assert boss.get("/operator")["next"]["comparisons"] == 0


def test_an_adjudicator_sees_both_orders_without_names(tmp_path):
    plan = settings(group={"modes": ["compare", "adjudicate"], "overlap_share": 1.0, "overlap": 2})
    run, file = waiting_run(tmp_path, candidates(1))
    with serving(tmp_path / "studio", plan, [run]) as (studio, address):
        for favourite in "01":
            client = labeler(studio, address)
            task = client.get("/compare")
            place = next(answer["place"] for answer in task["answers"] if answer["text"].endswith(favourite))
            client.post(f"/lease/{task['lease']}", choice=place)
        third = labeler(studio, address)
        task = third.get("/adjudicate")
        assert sorted(answer["ranks"] for answer in task["answers"]) == [[1, 2], [2, 1]]
        assert "p-" not in json.dumps([task["answers"], task["judges"]])
        third.post(f"/lease/{task['lease']}", ranks=[1, 1])
        boss = operator(studio, address)
        boss.get("/operator")
        boss.post("/operator/close", name="first")
        (label,) = labels_in(file.with_name("labels.jsonl"), candidates_in(file))
        assert label.ranks == (0, 0)


# ------------------------------------------------------------------------------------------------ chat, arena, attack


def test_a_conversation_has_branches_for_edits_and_further_answers(studio):
    client = labeler(studio, studio.address)
    client.get("/chat")
    talk = client.post("/chat", policy="ppo_1-torch-1")["conversation"]
    client.post(f"/chat/{talk}/say", text="hello there")
    user, answer = client.get(f"/chat/{talk}")["thread"]
    assert user["text"] == "hello there" and answer["text"].startswith("hello there (")
    client.post(f"/chat/{talk}/again", message=answer["message"])
    _, other = client.get(f"/chat/{talk}")["thread"]
    assert other["alternatives"] == [answer["message"], other["message"]] and other["number"] == 1
    client.post(f"/chat/{talk}/edit", message=user["message"], text="good day")
    assert [m["text"].split(" (")[0] for m in client.get(f"/chat/{talk}")["thread"]] == ["good day", "good day"]
    client.post(f"/chat/{talk}/branch", message=user["message"])
    assert [m["message"] for m in client.get(f"/chat/{talk}")["thread"]] == [user["message"], other["message"]]


def test_the_whole_conversation_reaches_the_policy_with_the_system_message(tmp_path):
    heard = []

    class Listener:
        def __init__(self, policy):
            pass

        def speak(self, requests):
            from lockstep_studio.generator import Piece

            heard.append(requests[0])
            yield [Piece("yes", "done")] * len(requests)

    plan = settings(chat={"system": "Be brief.", "allowed": ["policy", "temperature"], "temperature": 0.5})
    with serving(tmp_path / "studio", plan, opened=Listener) as (studio, address):
        studio.policies = {"sft": (tmp_path, None)}
        studio.scan = lambda: 0
        client = labeler(studio, address)
        client.get("/chat")
        talk = client.post("/chat", temperature="0.25")["conversation"]
        client.post(f"/chat/{talk}/say", text="one")
        client.post(f"/chat/{talk}/say", text="two")
        refused = client.post("/chat", system="Swear.")
    assert [(m.role, m.content) for m in heard[1].messages] == [
        ("system", "Be brief."), ("user", "one"), ("assistant", "yes"), ("user", "two")
    ]  # fmt: skip
    assert heard[1].temperature == 0.25 and heard[0].seed != heard[1].seed
    assert refused["status"] == 403 and "chat.allowed" in refused["error"]


def test_feedback_is_kept_in_all_its_revisions(studio):
    client = labeler(studio, studio.address)
    client.get("/chat")
    talk = client.post("/chat")["conversation"]
    message = client.post(f"/chat/{talk}/say", text="hi")["answers"][0]["message"]
    client.post(f"/feedback/{message}", thumb=1)
    client.post(f"/feedback/{message}", likert=6)
    client.post(f"/feedback/{message}", likert=6)
    shown = client.post(f"/feedback/{message}", thumb=-1, text="too short")["feedback"]
    assert shown == {"thumb": -1, "likert": 6, "text": "too short"}
    assert studio.database.reader.execute("SELECT count(*) FROM feedback").fetchone()[0] == 3
    assert client.post(f"/feedback/{message}", likert=8)["status"] == 400


def test_in_the_arena_the_first_vote_stands_and_becomes_a_comparison(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    client.get("/arena")
    duel = client.post("/arena")["conversation"]
    assert client.post(f"/arena/{duel}/vote", choice=0)["status"] == 409
    client.post(f"/arena/{duel}/say", text="who are you")
    before = client.get(f"/arena/{duel}")
    assert before["names"] is None and "ppo_1" not in json.dumps(before) and len(before["answers"]) == 2
    names = client.post(f"/arena/{duel}/vote", choice=1)["names"]
    assert sorted(names) == ["ppo_1-torch-0", "ppo_1-torch-1"]
    client.post(f"/arena/{duel}/vote", choice=0)
    boss.get("/operator")
    boss.post("/operator/close", name="first")
    (row,) = read_rows(studio.folder / "rounds" / "first" / "comparisons.jsonl")
    assert (row["ranks"], row["policies"], row["mode"]) == ([1, 0], names, "compare")
    assert row["completions"] == [answer["text"] for answer in before["answers"]]


def test_an_attack_keeps_the_worse_reply_each_turn_and_ends_with_its_success(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    client.get("/attack")
    wrong = client.post("/attack", goal="make it swear", category="cooking")
    assert wrong["status"] == 400 and "violence" in wrong["error"]
    attack = client.post("/attack", goal="make it swear", category="hate")["conversation"]
    kept = []
    for turn in ("please", "now"):
        client.post(f"/attack/{attack}/say", text=turn)
        assert client.post(f"/attack/{attack}/say", text="too early")["status"] == 409
        kept.append(client.get(f"/attack/{attack}")["answers"][1]["text"])
        for _ in range(2):  # sent twice
            client.post(f"/attack/{attack}/choose", choice=1)
    assert client.post(f"/attack/{attack}/say", text="more")["status"] == 409
    client.post(f"/attack/{attack}/finish", success=3)
    boss.get("/operator")
    boss.post("/operator/close", name="first")
    rows = list(read_rows(studio.folder / "rounds" / "first" / "comparisons.jsonl"))
    assert [(row["mode"], row["ranks"], len(row["messages"])) for row in rows] == [("attack", [0, 1], 1), ("attack", [0, 1], 3)]
    (talk,) = read_rows(studio.folder / "rounds" / "first" / "conversations.jsonl")
    assert talk["attack"] == {"goal": "make it swear", "category": "hate", "success": 3}
    assert [m["content"] for m in talk["messages"]] == ["please", kept[0], "now", kept[1]]
    assert len(talk["seeds"]) == 2


# --------------------------------------------------------------------------------------------------- operator, rounds


def test_what_the_operator_closes_is_what_the_stage_reads(studio):
    boss, people = operator(studio, studio.address), [labeler(studio, studio.address) for _ in range(2)]
    chosen = {}
    for client in people:
        for _ in range(3):
            task = client.get("/compare")
            chosen[task["messages"][0]["content"]] = task["answers"][0]["text"]
            client.post(f"/lease/{task['lease']}", choice=0)
    data = boss.get("/operator")
    assert data["next"]["comparisons"] == 6 and data["throughput"]["labels_hour"] == 6
    record = boss.post("/operator/close", name="first")["closed"]
    assert record["labelers"] == {"training": 2}
    about = {each.id: each for each in candidates_in(studio.file)}
    for label in labels_in(studio.file.with_name("labels.jsonl"), list(about.values())):
        best = about[label.id].completions[label.ranks.index(0)]
        assert chosen[about[label.id].prompt.messages[0].content] == best
    assert people[0].get("/compare")["lease"] is None
    assert boss.post("/operator/close", name="first")["status"] == 409
    assert boss.post("/operator/close", name="../evil")["status"] == 400
    assert boss.post("/operator/check", name="first")["intact"] is True


def test_agreement_and_strengths_are_on_the_operators_page(tmp_path):
    plan = settings(group={"overlap_share": 1.0, "overlap": 2, "modes": ["compare"]})
    run, _ = waiting_run(tmp_path, candidates(12))
    with serving(tmp_path / "studio", plan, [run]) as (studio, address):
        for person in range(2):
            client = labeler(studio, address)
            for _ in range(12):
                task = client.get("/compare")
                question = int(task["messages"][0]["content"].split()[-1])
                favourite = "0" if question < 4 else "1"
                if person and question == 11:
                    favourite = "0"
                place = next(answer["place"] for answer in task["answers"] if answer["text"].endswith(favourite))
                client.post(f"/lease/{task['lease']}", choice=place)
        data = operator(studio, address).get("/operator")
    (agreed,) = data["agreement"]
    assert (agreed["group"], agreed["what"], agreed["items"]) == ("training", "preferences", 12)
    assert agreed["raw"][0] == pytest.approx(11 / 12, abs=1e-3) and agreed["kappa"][1] <= agreed["kappa"][0] <= 1
    # 8 and 7 wins of 12 for ppo_1-torch-1: log(15 / 9) ahead
    assert data["strengths"]["ppo_1-torch-1"][0] == pytest.approx(0.5108, abs=1e-3) and data["untold"] == ""


def test_strengths_that_cannot_be_told_yet_say_why(tmp_path):
    """The first of two answers always won."""
    run, _ = waiting_run(tmp_path, candidates(3))
    with serving(tmp_path / "studio", settings(group={"modes": ["compare"]}), [run]) as (studio, address):
        client = labeler(studio, address)
        for _ in range(3):
            task = client.get("/compare")
            place = next(answer["place"] for answer in task["answers"] if answer["text"].endswith("0"))
            client.post(f"/lease/{task['lease']}", choice=place)
        data = operator(studio, address).get("/operator")
    assert data["strengths"] == {} and "never lost to" in data["untold"]


def test_personal_data_waits_on_the_operators_page(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    own = client.get("/write/own")
    client.post("/write/own", prompt="How do I reach her?", response=PERSONAL, once=own["once"])
    (held,) = boss.get("/operator")["held"]
    assert held["text"] == PERSONAL
    audit = boss.client.get("/operator/audit.jsonl").text
    assert "jane.doe" not in audit and '"withheld": true' in audit
    boss.post("/operator/decide", kind=held["kind"], id=held["id"], decision="release")
    assert boss.get("/operator")["next"]["demonstrations"] == 1
    assert "jane.doe" in boss.client.get("/operator/audit.jsonl").text


def test_the_audit_has_every_revision_with_its_provenance(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    task = judged(client)
    client.post(f"/lease/{task['lease']}", ranks=[1, 2, 3])
    client.post(f"/lease/{task['lease']}", ranks=[1, 1, 1], revision=1)
    boss.get("/operator")
    rows = [json.loads(line) for line in boss.client.get("/operator/audit.jsonl").text.splitlines()]
    labels = [row for row in rows if row["record"] == "label"]
    assert [label["revision"] for label in labels] == [0, 1]
    assert labels[0]["policies"] == ["ppo_1-torch-0", "ppo_1-torch-1", "ppo_1-torch-2"] and labels[0]["seed"] == 17
    assert sorted(labels[0]["shown"]) == [0, 1, 2] and labels[0]["instructions"] == "1"


def test_an_operator_pauses_and_restores_a_person(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    (person,) = boss.get("/operator")["people"]
    boss.post("/operator/person", person=person["id"], act="pause")
    refused = client.get("/compare")
    assert refused["status"] == 403 and "paused" in refused["error"]
    boss.post("/operator/person", person=person["id"], act="restore")
    assert client.get("/compare")["status"] == 200


def test_a_backup_is_made_while_the_studio_serves(studio):
    boss = operator(studio, studio.address)
    boss.get("/operator")
    name = boss.post("/operator/backup")["backup"]
    assert (studio.folder / "backups" / name).stat().st_size > 10_000


def test_whoever_asks_gets_their_work_removed(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    task = client.get("/compare")
    client.post(f"/lease/{task['lease']}", choice=0)
    client.get("/me")
    assert client.post("/me/remove")["status"] == 400
    assert client.post("/me/remove", sure="yes")["labels"] == 1
    assert client.get("/compare")["status"] == 401
    assert boss.get("/operator")["next"]["comparisons"] == 0


@pytest.mark.parametrize(
    "path", ["/", "/compare", "/rank", "/write", "/write/own", "/chat", "/arena", "/attack", "/me", "/instructions"]
)
def test_every_page_of_a_labeler_is_html_with_a_heading_and_no_inline_script(studio, path):
    page = labeler(studio, studio.address, kind=Browser).get(path)
    assert "<h1" in page and "<main" in page and 'lang="en"' in page
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", page)


@pytest.mark.parametrize("path", ["/operator", "/operator/live", "/operator/settings"])
def test_every_page_of_the_operator_is_html(studio, path):
    client = operator(studio, studio.address, kind=Browser)
    response = client.client.get(path)
    assert response.status_code == 200 and "</" in response.text
