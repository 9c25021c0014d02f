"""The miniature: a small closed world of instructions with a known truth. It is to RLHF what the fruit fly is to genetics.

world.py       the things, their properties, the vocabulary
tasks.py       families of instructions, with their right answers
responses.py   how people of different skill write responses
gold.py        the true score of any response
labelers.py    simulated people who rank completions
people.py      these as labelers of what policies write
goals.py       what attacks are after
attacks.py     an attacker that asks for it in disguise
corpus.py      raw text with the flaws of the web's
ability.py     what a model that reads the corpus can do
tokenizer.py   words to ids
source.py      all of it as a data source
shop.py        questions that need a tool, and the environment that is one
library.py     facts that changed since, or that only a search finds
"""

from lockstep.registry import Plugin

plugin = Plugin(
    components={
        "data": {
            "miniature": "lockstep_miniature.source:Miniature",
            "shop": "lockstep_miniature.shop:Questions",
            "library": "lockstep_miniature.library:Questions",
        },
        "environment": {"shop": "lockstep_miniature.shop:Shop"},
        "labeler": {"miniature": "lockstep_miniature.people:SimulatedLabelers"},
        "attacker": {"miniature": "lockstep_miniature.attacks:Disguises"},
    }
)
