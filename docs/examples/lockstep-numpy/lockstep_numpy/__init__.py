"""Plain numpy, differentiated by autograd: backend, policy and learner. The same files as ``lockstep_torch``.

decoder.py      the network of policies that start from scratch
generation.py   sampling with a KV cache
model.py        logprobs, entropy, values, scores; loading and saving
policies.py     the policy that configurations name: decoder
array_api.py    the namespace that losses are written against; torch and JAX bring their own
learner.py      gradients and Adam
backend.py      makes learners

There is no device.py: models need nothing from this backend.
"""

from pathlib import Path

from lockstep.registry import Plugin

plugin = Plugin(
    backend="numpy",
    requires=("autograd",),
    install="pip install autograd",
    conf=Path(__file__).parent / "conf",
    components={
        "backend": {"numpy": "lockstep_numpy.backend:NumpyBackend"},
        "policy": {"decoder": "lockstep_numpy.policies:Decoder"},
    },
)
