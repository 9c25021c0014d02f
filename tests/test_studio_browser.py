"""The studio in a real browser, driven by keys: nothing of it needs a mouse, a network or an exception to its security policy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest

from chromium import CHROMIUM, Chromium
from lockstep_studio.store import people
from studio_server import Echo, labeler, serving
from test_studio_pages import waiting_run
from test_studio_store import candidates, settings

pytest.importorskip("websockets")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


SHIFT = 8


@pytest.fixture
def browser(tmp_path):
    opened = Chromium(tmp_path / "chromium")
    yield opened
    opened.close()


@pytest.fixture
def studio(tmp_path):
    modes = ["compare", "rank", "arena", "chat", "attack", "write"]
    rows = [*candidates(3), *({**row, "id": f"rank{row['id']}"} for row in candidates(2, 3))]
    run, _ = waiting_run(tmp_path, rows)
    plan = settings(group={"modes": modes})
    with serving(tmp_path / "studio", plan, [run], opened=lambda policy: Echo(policy, 0.02)) as (made, address):
        made.policies = {"ppo_1-torch-0": (run, "ppo_1"), "ppo_1-torch-1": (run, "ppo_1")}
        made.scan = lambda: 0
        made.address = address
        yield made


def join(browser: Chromium, studio) -> None:
    token = studio.database.now(people.invite, "labeler", "training", 1, 1.0, studio.clock())
    browser.go(f"{studio.address}/join/{token}")
    browser.key("Enter")
    browser.wait("document.querySelector('h1')?.textContent === 'Instructions' && document.activeElement.tagName === 'BUTTON'")
    browser.key("Enter")
    browser.wait("document.querySelector('h1')?.textContent.startsWith('What would')")


def chat(browser: Chromium, studio, question: str) -> None:
    """Join, and have a question answered."""
    join(browser, studio)
    browser.go(f"{studio.address}/chat")
    browser.key("n")
    browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    browser.write(question)
    browser.key("Enter", 2)
    browser.wait("document.querySelectorAll('.message.assistant .feedback').length === 1")


def labels(studio) -> list[dict]:
    return [json.loads(row["content"]) for row in studio.database.reader.execute("SELECT content FROM labels ORDER BY id")]


SETTLED = "document.readyState === 'complete' && !document.querySelector('.htmx-request, .htmx-swapping, .htmx-settling')"
"""Keys that are pressed before a page's script has run, or while a page is put in, are lost."""


def heading(browser: Chromium, text: str) -> None:
    browser.wait(f"document.querySelector('h1')?.textContent.includes({json.dumps(text)}) && {SETTLED}", 60)


def test_keys_alone_join_compare_and_rank_and_the_policy_is_never_broken(browser, studio):
    join(browser, studio)
    browser.key("1")
    heading(browser, "Which answer is better")
    browser.key("2")
    heading(browser, "Saved")
    browser.key("n")
    heading(browser, "Which answer is better")
    browser.key("t")
    heading(browser, "Saved")
    assert [each["ranks"] for each in labels(studio)][1] == [0, 0] and sorted(labels(studio)[0]["ranks"]) == [0, 1]
    browser.go(f"{studio.address}/rank")
    for place, rating in enumerate("753"):
        heading(browser, f"Answer {place + 1} of 3")
        browser.key(rating)
        browser.key("b")
        browser.key("Enter")
    heading(browser, "Order")
    for digit in "212":
        browser.key(digit)
    browser.key("Enter")
    heading(browser, "Answer 1 of 3")
    last = labels(studio)[-1]
    assert (
        sorted(last["ranks"]) == [0, 1, 1] and sorted(last["ratings"]) == [3, 5, 7] and last["flags"] == [["inappropriate"]] * 3
    )
    assert browser.problems() == [] and browser.hosts() == {"127.0.0.1"}


def test_keys_alone_chat_stream_stop_and_give_feedback(browser, studio):
    chat(browser, studio, "one two three")
    assert browser.run("document.querySelector('.message.assistant .text').textContent").startswith("one two three (")
    browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    browser.write("forever and ever")
    browser.key("Enter", 2)
    browser.wait("document.querySelector('#live [data-side]')?.textContent.length > 30")
    browser.key("Escape")
    browser.wait("document.querySelectorAll('.message.assistant .feedback').length === 2")
    assert "(stopped)" in browser.run("document.body.innerText")
    browser.run("document.querySelector('.feedback input[value=\"6\"]').click()")
    until = time.time() + 10
    while not (found := studio.database.reader.execute("SELECT likert FROM feedback").fetchone()) and time.time() < until:
        time.sleep(0.05)
    assert found["likert"] == 6 and browser.problems() == []


def test_keys_alone_ask_for_another_answer_reword_a_question_and_rate(browser, studio):
    chat(browser, studio, "one two")
    browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    browser.key("Escape")
    browser.key("r")
    browser.wait("document.querySelector('.message.assistant .tools').innerText.includes('2/2')")
    browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    browser.key("Escape")
    browser.key("e")
    browser.key("Tab")
    browser.wait("document.activeElement.value === 'one two'")
    browser.key("End", 2)
    browser.write(" three")
    browser.key("Enter", 2)
    browser.wait("document.querySelector('.message.user .tools').innerText.includes('2/2')")
    said = "SELECT content FROM messages WHERE role = 'user' ORDER BY id"
    assert [row["content"] for row in studio.database.reader.execute(said)] == ["one two", "one two three"]
    browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    browser.tab("e.name === 'likert'", SHIFT)
    browser.key(" ")
    for _ in range(2):  # quicker than the server answers
        browser.key("ArrowLeft")
    last = "SELECT likert FROM feedback ORDER BY id DESC LIMIT 1"
    until = time.monotonic() + 60
    while (row := studio.database.reader.execute(last).fetchone()) is None or row["likert"] != 5:
        assert time.monotonic() < until, dict(row or {})
        time.sleep(0.05)
    browser.wait("document.getElementById('status').textContent === 'Saved.'")
    assert browser.run("document.activeElement.checked && document.activeElement.value") == "5"
    assert browser.problems() == []


def test_feedback_that_is_refused_says_so(browser, studio):
    chat(browser, studio, "one two")
    (person,) = studio.database.reader.execute("SELECT id FROM people").fetchone()
    studio.database.now(people.set_standing, person, "paused")
    browser.run("document.querySelector('.feedback input[value=\"6\"]').click()")
    browser.wait("document.getElementById('status').textContent.includes('paused')")


def test_two_answers_stream_side_by_side_and_the_names_follow_the_vote(browser, studio):
    join(browser, studio)
    browser.go(f"{studio.address}/arena")
    browser.key("n")
    browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    browser.write("who is there")
    browser.key("Enter", 2)
    heading(browser, "Which answer is better")
    assert "ppo_1" not in browser.run("document.documentElement.outerHTML")
    browser.key("1")
    heading(browser, "Saved")
    assert "ppo_1-torch-" in browser.run("document.body.innerText") and browser.problems() == []


def test_answers_that_were_stopped_are_asked_for_again_by_a_key_and_not_judged(browser, studio):
    join(browser, studio)
    browser.go(f"{studio.address}/arena")
    browser.key("n")
    browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    browser.write("forever and ever")
    browser.key("Enter", 2)
    for key in ("Escape", "r", "Escape"):
        if key == "Escape":
            browser.wait("[...document.querySelectorAll('#live [data-side]')].every((side) => side.textContent.length > 30)")
        browser.key(key)
        if key == "Escape":
            browser.wait("document.querySelector('[data-key=r]') && document.querySelectorAll('.answer .text').length === 4")
            assert browser.run("document.querySelectorAll('[name=choice]').length") == 0
            browser.wait(SETTLED)
    stopped = "SELECT count(*) FROM messages WHERE state = 'stopped'"
    until = time.monotonic() + 30
    while (count := studio.database.reader.execute(stopped).fetchone()[0]) < 4 and time.monotonic() < until:
        time.sleep(0.05)  # the page may be the one before the second stop
    assert count == 4
    assert browser.problems() == []


def dim(browser: Chromium, address: str, theme: str, paths: Sequence[str]) -> dict[str, list]:
    """What cannot be read well, by page."""
    found = {}
    for path in paths:
        browser.go(f"{address}{path}")
        browser.run(f"document.documentElement.dataset.theme = '{theme}'")
        browser.run("document.querySelectorAll('details').forEach((e) => e.open = true)")
        found[path] = browser.run(CONTRAST)
    return {path: bad for path, bad in found.items() if bad}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_placeholders_have_a_contrast_of_four_and_a_half_in_both_themes(browser, studio, theme):
    """WCAG 2.2, success criterion 1.4.3 AA, of every text on the pages of labelers."""
    join(browser, studio)
    talks = []
    for mode, count in {"chat": 1, "arena": 2}.items():
        browser.go(f"{studio.address}/{mode}")
        browser.key("n")
        browser.wait("document.activeElement.tagName === 'TEXTAREA'")
        browser.write("one two")
        browser.key("Enter", 2)
        answers = "document.querySelectorAll('.feedback, [name=choice][data-key]').length"
        browser.wait(f"{answers} >= {count} && {SETTLED}")
        talks.append(browser.run("location.pathname"))
    assert dim(browser, studio.address, theme, talks) == {}
    assert browser.run("document.querySelectorAll('[name=choice]').length") == 4  # a vote: the names are on a page of their own
    browser.key("1")
    heading(browser, "Saved")
    modes = ["/", "/compare", "/rank", "/write", "/write/own", "/chat", "/arena", "/attack"]
    assert dim(browser, studio.address, theme, [talks[1], *modes, "/instructions", "/me", "/lease/none"]) == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_pages_of_operators_and_adjudicators_have_it_too(browser, tmp_path, theme):
    plan = settings(group={"modes": ["compare", "write", "adjudicate"], "overlap_share": 1.0, "overlap": 2})
    run, _ = waiting_run(tmp_path, candidates(2))
    with serving(tmp_path / "studio", plan, [run]) as (made, address):
        for choice in "01":
            client = labeler(made, address)
            for _ in range(2):
                task = client.get("/compare")
                place = next(answer["place"] for answer in task["answers"] if answer["text"].endswith(choice))
                client.post(f"/lease/{task['lease']}", choice=place)
        task = client.get("/write")
        client.post(f"/lease/{task['lease']}", response="Write to jane.doe@example.org")
        made.address = address
        join(browser, made)
        assert dim(browser, address, theme, ["/adjudicate"]) == {}
        assert "Others disagree" in browser.run("document.body.innerText")
        browser.call("Network.clearBrowserCookies")
        boss = made.database.now(people.invite, "operator", people.OPERATORS, 1, 1.0, made.clock())
        assert dim(browser, address, theme, ["/", f"/join/{boss}"]) == {}
        browser.tab("e.tagName === 'BUTTON' && e.form?.action.includes('/join/')")
        browser.key("Enter")
        heading(browser, "Operator")
        assert dim(browser, address, theme, ["/operator", "/operator/settings"]) == {}
        browser.go(f"{address}/operator")
        shown = browser.run("document.body.innerText")
        assert all(part in shown for part in ("Krippendorff", "Bradley-Terry", "jane.doe", "Make a link"))


def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path, studio):
    browser = Chromium(tmp_path / "phone")
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        join(browser, studio)
        for path in ("/", "/compare", "/rank", "/write", "/chat", "/arena", "/attack"):
            browser.go(f"{studio.address}{path}")
            assert browser.run("document.documentElement.scrollWidth") <= 360, path
    finally:
        browser.close()


CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data; };
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => { const v = c[i] / 255;
    return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const hint = e.placeholder && !e.value;
    const field = e.matches("input:not([type=radio], [type=checkbox], [type=hidden]), textarea, select") && (e.value || hint);
    const own = field || [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(".unseen, .skip, script, noscript, option")) continue;
    const style = getComputedStyle(e, hint ? "::placeholder" : null), back = behind(e), alpha = Number(style.opacity);
    const front = rgba(style.color).map((v, i) => i < 3 ? alpha * v + (1 - alpha) * back[i] : v);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.className, (hint ? e.placeholder : e.textContent).slice(0, 30), ratio]);
  }
  return bad;
})()
"""
