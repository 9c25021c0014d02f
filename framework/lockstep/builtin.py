"""The core's own manifest: a data source, people as labelers, the rewards of environments, and two trackers."""

from pathlib import Path

from lockstep.registry import Plugin

HERE = Path(__file__).parent
CONF = next(folder for folder in (HERE / "conf", HERE.parents[1] / "conf") if folder.is_dir())
"""The configuration folder: in the package if installed from a wheel, at the top of the repository in a checkout."""

plugin = Plugin(
    components={
        "data": {"files": "lockstep.data.files:Files"},
        "labeler": {"people": "lockstep.data.people:People"},
        "reward_model": {"environment": "lockstep.learning.episodes:EnvironmentReward"},
        "tracker": {"wandb": "lockstep.reporting.tracking:Wandb", "none": "lockstep.reporting.tracking:Silent"},
    },
    conf=CONF,
)
