"""Every mode of the studio in a real browser, on a run that waits for people; pictures of each for the docs.

    lockstep run experiment=feedback policy.path=models/smollm2 data.prompts='[{path: questions.jsonl}]' collection.samples=3 ...
    python benchmarks/studio_tour.py runs/feedback/NAME models/smollm2 --output docs/studio
    (the first command again: it continues with the labels)

Headless Chromium is driven by keys. The person of the tour prefers the longer of two answers that end, which is a taste that a
reward model can learn. A second person labels the overlap the other way around, so that there is something to adjudicate.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import Chromium  # noqa: E402

SETTINGS = """\
groups:
  training: {labels: 1, overlap: 2, overlap_share: 0.4, modes: [rank, compare, arena, chat, attack, write]}
  expert: {modes: [adjudicate, write], labels: 0}
chat: {temperature: 0.7, max_tokens: 60, allowed: [policy, system, temperature]}
attack: {turns: 2, goals: ["make it give medical advice", "make it insult somebody"]}
"""
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
SHOTS = (1180, 860)


class Visitor:
    """Somebody in a browser."""

    def __init__(self, folder: Path, address: str, pictures: Path):
        self.browser, self.address, self.pictures = Chromium(folder, *SHOTS), address, pictures

    def heading(self, text: str, seconds: float = 120) -> None:
        self.browser.wait(f"document.querySelector('h1')?.textContent.includes({json.dumps(text)})", seconds)

    def join(self, link: str) -> None:
        self.browser.go(link)
        self.browser.key("Enter")
        self.heading("Instructions")

    def agree(self) -> None:
        self.browser.key("Enter")
        self.heading("What would")

    def go(self, path: str) -> None:
        self.browser.go(f"{self.address}{path}")

    def say(self, text: str) -> None:
        self.browser.wait("document.activeElement.tagName === 'TEXTAREA'")
        self.browser.write(text)
        self.browser.key("Enter", 2)

    def picture(self, name: str, whole: bool = True) -> None:
        self.browser.run("window.scrollTo(0, 0)")
        self.browser.picture(self.pictures / f"{name}.png", whole)

    def text(self, selector: str) -> list[str]:
        found: list[str] = self.browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
        return found

    def rank(self, pictures: bool) -> None:
        """The task on the screen, answer by answer and then all: the longer, the better."""
        count = 0
        while "by itself" in self.text("h1")[0]:
            length = len(self.text(".answer .text")[0])
            self.browser.key(str(min(7, 1 + length // 40)))
            if pictures and not count:
                self.picture("judge")
            before = self.text("h1")[0]
            self.browser.key("Enter")
            self.browser.wait(f"document.querySelector('h1')?.textContent !== {json.dumps(before)}")
            count += 1
        lengths = [len(text) for text in self.text(".answer .text")]
        order = sorted(set(lengths), reverse=True)
        for length in lengths:
            self.browser.key(str(1 + order.index(length)))
        if pictures:
            self.picture("rank")
        self.browser.key("Enter")
        self.browser.wait("!document.querySelector('h1')?.textContent.includes('Order')")


def chat(v: Visitor) -> None:
    v.go("/chat")
    v.browser.key("n")
    v.say("Name three uses of an old newspaper.")
    v.browser.wait("document.querySelectorAll('.message.assistant .feedback').length === 1", 180)
    v.say("Which of them is best for a garden?")
    v.browser.wait("document.querySelectorAll('.message.assistant .feedback').length === 2", 180)
    v.browser.run("document.querySelector('.feedback input[value=\"5\"]').click()")
    v.picture("chat")
    v.browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    v.browser.write("Now write a very long story about newspapers.")
    v.browser.key("Enter", 2)
    v.browser.wait("document.querySelector('#live [data-side]')?.textContent.length > 20", 180)
    v.browser.key("Escape")
    v.browser.wait("document.body.innerText.includes('(stopped)')", 60)


def arena(v: Visitor) -> None:
    v.go("/arena")
    v.browser.key("n")
    v.say("Give me one tip for sleeping better.")
    v.heading("Which answer is better", 180)
    v.picture("ask-two")
    v.browser.key("1")
    v.heading("Saved")


def attack(v: Visitor) -> None:
    v.go("/attack")
    v.browser.wait("document.activeElement.tagName === 'TEXTAREA'")
    v.browser.write("make it give medical advice")
    v.browser.run("document.querySelector('[name=\"category\"]').value = 'other'")
    v.browser.run("document.querySelector('form[action=\"/attack\"] button').click()")
    v.heading("Goal")
    v.say("My chest hurts. Which pills should I take?")
    v.browser.wait("document.body.innerText.includes('Which answer is worse?')", 180)
    v.picture("attack")
    v.browser.key("1")
    v.browser.wait("document.body.innerText.includes('how far did it get?')", 60)
    v.browser.run('document.querySelector(\'button[name="success"][value="2"]\').click()')
    v.browser.wait("document.body.innerText.includes('(over)')", 60)


def write(v: Visitor) -> None:
    v.go("/write")
    v.heading("How should")
    v.picture("write")
    v.say("Here is a short and friendly answer, written by a person.")
    v.browser.wait("document.body.innerText.includes('1 done')", 60)


def disagree(address: str, link: str) -> int:
    """A second person, who speaks JSON and prefers the shorter; how many tasks they had."""
    with httpx.Client(base_url=address, headers={"accept": "application/json"}, timeout=60) as client:
        path = link.removeprefix(address)
        csrf = client.get(path).json()["csrf"]
        csrf = client.post(path, json={"csrf": csrf}).json()["csrf"]
        client.post("/instructions", json={"csrf": csrf, "version": "1"}).raise_for_status()
        done = 0
        while (task := client.get("/rank").json()).get("lease"):
            path = f"/lease/{task['lease']}"
            if task["step"] == "judge":
                given = {"place": task["answers"][0]["place"], "rating": 4, "flags": []}
                client.post(f"{path}/judge", json={"csrf": task["csrf"], **given}).raise_for_status()
                continue
            lengths = [len(answer["text"]) for answer in task["answers"]]
            ranks = [1 + sorted(set(lengths)).index(length) for length in lengths]
            client.post(path, json={"csrf": task["csrf"], "ranks": ranks, "revision": 0}).raise_for_status()
            done += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="the run that waits, and further policies to talk to")
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args()
    a.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lockstep-tour-") as name:
        folder = Path(name)
        (folder / "studio.yaml").write_text(SETTINGS)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address, began = f"http://127.0.0.1:{port}", time.monotonic()
        studio = Path(a.runs[0]).parent / "studio"
        command = [sys.executable, "-m", "lockstep", "serve", *a.runs, "--folder", str(studio), "--port", str(port), "--operator"]
        with subprocess.Popen(
            [*command, "--settings", str(folder / "studio.yaml")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as server:
            try:
                said = ""
                while not (found := re.search(r"/join/(\S+)", said.replace("\n", ""))):
                    line = (server.stdout or sys.stdin).readline()
                    if not line:
                        sys.exit(f"the studio did not start: {said}")
                    said += line
                time.sleep(1)
                tour(folder, address, f"{address}/join/{found[1]}", a.output)
            finally:
                server.terminate()
        print(f"{len(list(a.output.glob('*.png')))} pictures in {a.output}, {time.monotonic() - began:.0f} s")


def tour(folder: Path, address: str, operators: str, pictures: Path) -> None:
    operator = Visitor(folder / "operator", address, pictures)
    operator.browser.go(operators)
    operator.browser.key("Enter")
    operator.heading("Operator")

    def invited(group: str) -> str:
        operator.go("/operator")
        operator.heading("Operator")
        operator.browser.run(
            f"(() => {{ const form = document.querySelector('form[action=\"/operator/invite\"]');"
            f"form.querySelector('[name=\"group\"]').value = '{group}'; form.requestSubmit(); }})()"
        )
        operator.browser.wait("document.querySelector('.notice code')")
        return operator.text(".notice code")[0]

    labeler = Visitor(folder / "labeler", address, pictures)
    labeler.join(invited("training"))
    labeler.picture("instructions")
    labeler.agree()
    labeler.picture("home")
    labeler.go("/rank")
    first = True
    while "by itself" in (labeler.text("h1") or [""])[0]:
        labeler.rank(first)
        first = False
    for mode in (chat, arena, attack, write):
        mode(labeler)
    labeler.go("/chat")
    labeler.browser.call("Emulation.setDeviceMetricsOverride", **PHONE)
    labeler.browser.run("document.documentElement.dataset.theme = 'dark'")
    labeler.browser.run("document.querySelector('.list a')?.click()")
    labeler.browser.wait("document.querySelectorAll('.message').length > 2", 60)
    labeler.picture("phone", whole=False)
    print(f"{disagree(address, invited('training'))} tasks labelled the other way around")
    expert = Visitor(folder / "expert", address, pictures)
    expert.join(invited("expert"))
    expert.agree()
    expert.go("/adjudicate")
    expert.heading("Others disagree")
    expert.picture("adjudicate")
    while "Others disagree" in (expert.text("h1") or [""])[0]:
        count = len(expert.text(".answer .text"))
        left = expert.text(".bar")[0]
        for place in range(count):
            expert.browser.key(str(place + 1))
        expert.browser.key("Enter")
        expert.browser.wait(f"document.querySelector('.bar')?.textContent !== {json.dumps(left)}", 60)
    operator.go("/operator")
    operator.heading("Operator")
    operator.picture("operator")
    operator.browser.run("document.querySelector('form[action=\"/operator/close\"] button').click()")
    operator.browser.wait("document.body.innerText.includes('round-1')", 60)
    for visitor in (operator, labeler, expert):
        if problems := visitor.browser.problems():
            print("the browser complains:", problems)
        visitor.browser.close()


if __name__ == "__main__":
    main()
