"""TensorBoard as a tracker. TensorBoard's own writer needs neither TensorFlow nor torch.

tracker.py     one event file per stage
"""

from lockstep.registry import Plugin

plugin = Plugin(
    requires=("tensorboard",),
    install="pip install 'lockstep-rlhf[tensorboard]'",
    components={"tracker": {"tensorboard": "lockstep_tensorboard.tracker:TensorBoard"}},
)
