"""The miniature: a small closed world of instructions with a known truth. It is to RLHF what the fruit fly is to genetics.

world.py       the things, their properties, the vocabulary
tasks.py       families of instructions, with their right answers
responses.py   how people of different skill write responses
gold.py        the true score of any response
labelers.py    simulated people who rank completions
people.py      the simulated people as labelers of policies' responses
goals.py       the goals of attacks
attacks.py     an attacker that disguises its requests
corpus.py      raw text with the flaws of web text
ability.py     a test of what a model learns from the corpus
tokenizer.py   words to ids
source.py      all of it as a data source
shop.py        questions that need a tool, and the environment that provides it
matching.py    eight prompts and their responses, of which comparisons cover some
library.py     facts that have changed since the corpus, or that only a search finds
"""

from lockstep.registry import Plugin

plugin = Plugin(
    components={
        "data": {
            "miniature": "lockstep_miniature.source:Miniature",
            "shop": "lockstep_miniature.shop:Questions",
            "library": "lockstep_miniature.library:Questions",
            "matching": "lockstep_miniature.matching:Matching",
        },
        "environment": {"shop": "lockstep_miniature.shop:Shop"},
        "labeler": {"miniature": "lockstep_miniature.people:SimulatedLabelers"},
        "attacker": {"miniature": "lockstep_miniature.attacks:Disguises"},
    }
)
