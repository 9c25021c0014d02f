"""Gymnasium environments as text.

games.py   a data source of prompts, and an environment that replies
"""

from lockstep.registry import Plugin

plugin = Plugin(
    requires=("gymnasium",),
    install="pip install 'lockstep-rlhf[gymnasium]'",
    components={
        "data": {"gymnasium": "lockstep_gymnasium.games:Beginnings"},
        "environment": {"gymnasium": "lockstep_gymnasium.games:Game"},
    },
)
