"""Every mode of the studio in a real browser, on runs that wait for people, and the training on what was labelled; pictures of
each mode for the docs.

    python benchmarks/studio_tour.py models/smollm2 --folder runs/tour --output docs/studio

Two runs of `experiment=feedback` on one model collect answers and wait: `ranks` has three of the model to each question, `pairs`
one of the model and one of a second policy, which learned from a few demonstrations to be brief. The tour labels both, closes
the round, and lets the runs go on: each trains a reward model on its labels, and PPO against it.

Headless Chromium is driven by keys. The person of the tour prefers answers that end, and of two that end the longer, which is a
taste that a reward model can learn. A second person compares demonstrations with answers, and a third ranks the overlap the
other way around, so that there is something to adjudicate.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import Chromium  # noqa: E402

QUESTIONS = "benchmarks/human/questions.jsonl"
"""With what a person would answer, which only the tour's demonstration uses."""
SIZES = f"""
collection.prompts=8 collection.batch_size=8 collection.temperature=0.7
sft.batch_size=4 sft.epochs=3 sft.optimizer.learning_rate=5e-5
reward.batch_size=4 reward.epochs=2 algorithm.iterations=2 algorithm.batch_size=8 algorithm.minibatches=2
'lengths={{prompt: 64, response: 96, multiple: 32}}' 'sft.lengths=${{lengths}}'
policy.tokenizer.pad_token="'<|pad|>'" 'data.prompts=[{{path: {QUESTIONS}}}]' tracker=none
"""
"""Small enough for two cores; they show that the parts fit, and nothing of how well feedback works."""
RUNS = {
    "ranks": "collection.samples=3",
    "pairs": """
collection.samples=2 'data.demonstrations=[{path: benchmarks/human/brief.jsonl}]' ~stages '+stages={
brief: {algorithm: "${sft}", policy: new},
labels: {collection: "${collection}", labeler: "${labeler}", policies: [new, brief]},
reward: {algorithm: "${reward}", policy: new, comparisons: [labels]},
ppo: {algorithm: "${algorithm}", policy: new, reward_model: "${reward_model}"}}'
""",
}
WAITS = 130
"""The exit code of a run that waits for people."""
SETTINGS = """\
groups:
  training: {labels: 1, overlap: 2, overlap_share: 0.4, modes: [compare, rank, arena, chat, attack, write]}
  expert: {modes: [adjudicate, write], labels: 0}
chat: {temperature: 0.7, max_tokens: 60, allowed: [policy, system, temperature]}
attack: {turns: 2, goals: ["make it give medical advice", "make it insult somebody"]}
"""
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
SHOTS = (1180, 860)
SHIFT = 8


def liking(text: str) -> tuple[bool, int]:
    """Of an answer, how much the person of the tour likes it."""
    return text.rstrip().endswith((".", "!", "?", '"')), len(text)


def choice(texts: Sequence[str]) -> str:
    """The key for the better of two answers, for a tie of two that end and are about as long, or for both bad: neither ends."""
    (one, first), (other, second) = map(liking, texts)
    if not (one or other):
        return "b"
    if one and other and abs(first - second) < 0.1 * max(first, second):
        return "t"
    return "1" if (one, first) > (other, second) else "2"


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

    def picture(self, name: str) -> None:
        """Of the whole page, on a screen as high as it is."""
        size = {"width": SHOTS[0], "height": self.browser.run("document.body.scrollHeight")}
        self.browser.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        self.browser.run("window.scrollTo(0, 0)")
        self.browser.picture(self.pictures / f"{name}.png")
        self.browser.call("Emulation.clearDeviceMetricsOverride")

    def text(self, selector: str) -> list[str]:
        found: list[str] = self.browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
        return found

    def rank(self, pictures: bool) -> None:
        """The task on the screen, answer by answer and then all."""
        count = 0
        while "by itself" in self.text("h1")[0]:
            whole, length = liking(self.text(".answer .text")[0])
            self.browser.key(str(1 + 3 * whole + min(3, length // 100)))
            if pictures and not count:
                self.picture("judge")
            before = self.text("h1")[0]
            self.browser.key("Enter")
            self.browser.wait(f"document.querySelector('h1')?.textContent !== {json.dumps(before)}")
            count += 1
        liked = [liking(text) for text in self.text(".answer .text")]
        order = sorted(set(liked), reverse=True)
        for each in liked:
            self.browser.key(str(1 + order.index(each)))
        if pictures:
            self.picture("rank")
        self.browser.key("Enter")
        self.browser.wait("!document.querySelector('h1')?.textContent.includes('Order')")


def compare(v: Visitor, pictures: bool) -> Counter[str]:
    """All pairs that are left: how often each key was pressed. No name is anywhere in a page before the vote. Pictures are of the
    first pair of which one is better."""
    keys = Counter[str]()
    v.go("/compare")
    while "Which answer" in v.text("h1")[0]:
        page, key = v.browser.run("document.documentElement.outerHTML"), choice(v.text(".answer .text"))
        drawn = pictures and key in "12" and not keys["1"] + keys["2"]
        if drawn:
            v.picture("compare")
        v.browser.key(key)
        keys[key] += 1
        v.heading("Saved")
        names = [heading.replace("your choice", "").strip() for heading in v.text(".answer h2")]
        assert not any(name in page for name in names if "-" in name), names
        if drawn:
            v.picture("compare-names")
        if "person" in names:
            v.picture("compare-demonstration")
        v.browser.key("n")
        v.browser.wait("document.querySelector('h1') && !document.querySelector('h1').textContent.includes('Saved')")
    return keys


def answered(v: Visitor, count: int) -> None:
    """Wait until so many answers are there, whole."""
    here = f"document.querySelectorAll('.message.assistant .feedback').length === {count}"
    v.browser.wait(f"{here} && !document.getElementById('live').checkVisibility()", 300)


def chat(v: Visitor) -> None:
    v.go("/chat")
    v.browser.key("n")
    v.say("Name three uses of an old newspaper.")
    answered(v, 1)
    v.browser.key("Escape")
    v.browser.key("r")
    v.browser.wait("document.querySelector('main').innerText.includes('2/2')", 300)
    v.say("Which of them is best for a garden?")
    answered(v, 2)
    v.browser.key("Escape")
    v.browser.key("e")
    v.browser.key("Tab")
    v.browser.wait("document.activeElement.name === 'text' && document.activeElement.value.startsWith('Which')")
    v.browser.key("End", 2)
    v.say(" Answer in one sentence.")
    v.browser.wait("document.querySelector('main').innerText.split('2/2').length === 3", 300)
    answered(v, 2)
    v.browser.tab("e.name === 'likert'", SHIFT)
    for key in (" ", "ArrowLeft", "ArrowLeft"):  # 7, 6, 5
        v.browser.key(key)
    v.browser.tab("e.name === 'thumb'", SHIFT)
    v.browser.key("ArrowLeft")
    v.picture("chat")
    v.browser.tab("e.closest('.say')")
    v.say("Now write a very long story about newspapers.")
    v.browser.wait("document.querySelector('#live [data-side]')?.textContent.length > 20", 300)
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
    v.browser.key("Tab")
    v.browser.key("o")  # other
    v.browser.key("Enter", 2)
    v.heading("Goal")
    v.say("My chest hurts. Which pills should I take?")
    v.browser.wait("document.body.innerText.includes('Which answer is worse?')", 300)
    v.picture("attack")
    v.browser.key("1")
    v.browser.wait("document.body.innerText.includes('how far did it get?')", 60)
    v.browser.tab("e.name === 'success' && e.value === '2'")
    v.browser.key("Enter")
    v.browser.wait("document.body.innerText.includes('(over)')", 60)


def write(v: Visitor) -> None:
    v.go("/write")
    v.heading("How should")
    v.picture("write")
    questions = [json.loads(line) for line in (ROOT / QUESTIONS).read_text().splitlines()]
    v.say({each["prompt"]: each["response"] for each in questions}[v.text(".message.user .text")[0]])
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


def feedback(name: str, model: str, folder: Path) -> int:
    """`experiment=feedback` as far as it comes: its exit code."""
    sizes = shlex.split(f"{SIZES} {RUNS[name]}".replace("\n", " "))
    command = [
        sys.executable,
        "-m",
        "lockstep",
        "run",
        "experiment=feedback",
        f"policy.path={model}",
        f"folder={folder}",
        f"name={name}",
    ]
    return subprocess.run([*command, *sizes], cwd=ROOT, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", help="a folder with SmolLM2: benchmarks/smollm2.py")
    parser.add_argument("--folder", type=Path, required=True, help="of the runs and the studio")
    parser.add_argument("--output", type=Path, required=True, help="for the pictures")
    a = parser.parse_args()
    a.output.mkdir(parents=True, exist_ok=True)
    model, runs = str(Path(a.model).resolve()), a.folder.resolve()
    codes = [feedback(name, model, runs) for name in RUNS]
    if codes != [WAITS] * len(RUNS):
        sys.exit(f"the runs should wait for people, but ended with {codes}")
    began = time.monotonic()
    serve([*(str(runs / name) for name in RUNS), model], runs / "studio", a.output)
    print(f"{len(list(a.output.glob('*.png')))} pictures in {a.output}, {time.monotonic() - began:.0f} s")
    sys.exit(max(feedback(name, model, runs) for name in RUNS))


def serve(served: Sequence[str], studio: Path, pictures: Path) -> None:
    """The tour, in a studio of these runs and policies."""
    with tempfile.TemporaryDirectory(prefix="lockstep-tour-") as name:
        folder = Path(name)
        (folder / "studio.yaml").write_text(SETTINGS)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "lockstep", "serve", *served, "--folder", str(studio), "--port", str(port), "--operator"]
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
                tour(folder, address, f"{address}/join/{found[1]}", pictures)
            finally:
                server.terminate()


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
    print("pairs:", dict(compare(labeler, pictures=True)), flush=True)
    for mode in (chat, arena, attack, write):
        mode(labeler)
    labeler.go("/chat")
    labeler.browser.call("Emulation.setDeviceMetricsOverride", **PHONE)
    labeler.browser.run("document.documentElement.dataset.theme = 'dark'")
    labeler.browser.run("document.querySelector('.list a')?.click()")
    labeler.browser.wait("document.querySelectorAll('.message').length > 2", 60)
    labeler.browser.picture(pictures / "phone.png", whole=False)
    operator.go("/operator")
    operator.heading("Operator")
    operator.browser.tab("e.form?.action.endsWith('/operator/against')")
    operator.browser.key("Enter")
    operator.browser.wait("document.activeElement.id === 'main'", 60)
    reader = Visitor(folder / "reader", address, pictures)
    reader.join(invited("training"))
    reader.agree()
    print("pairs of the overlap, and a demonstration:", dict(compare(reader, pictures=False)), flush=True)
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
    operator.browser.tab("e.form?.action.endsWith('/operator/close') && e.tagName === 'BUTTON'")
    operator.browser.key("Enter")
    operator.browser.wait("document.body.innerText.includes('round-1')", 60)
    for visitor in (operator, labeler, reader, expert):
        if problems := visitor.browser.problems():
            print("the browser complains:", problems)
        visitor.browser.close()


if __name__ == "__main__":
    main()
