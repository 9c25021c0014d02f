"""OpenEnv environments: servers that hold a session for each episode.

sessions.py   a data source of prompts, and an environment that replies
"""

from lockstep.registry import Plugin

plugin = Plugin(
    requires=("websockets",),
    install="pip install 'lockstep-rlhf[openenv]'",
    components={
        "data": {"openenv": "lockstep_openenv.sessions:Beginnings"},
        "environment": {"openenv": "lockstep_openenv.sessions:Remote"},
    },
)
