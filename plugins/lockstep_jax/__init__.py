"""JAX and XLA: backend, policies and learner. Sibling of ``lockstep_torch``: the same files in the same order, each of which
imports from earlier ones only.

    mesh.py         several devices: parameters and rows divided
    device.py       precision, memory, where compiled programs are kept
    attention.py    attention, and what its queries see
    products.py     matmuls in the form that XLA runs fast                                             (*)
    decoder.py      the network in flax.nnx, for every family of `lockstep.models.architecture`, with or without adapters
    parameters.py   its parameters to and from checkpoint names                                                (*)
    generation.py   sampling with a KV cache, one compiled program
    model.py        logprobs, entropy, values, scores; loading and saving
    policies.py     the configuration's choices: decoder, huggingface, lora
    learner.py      gradients and Adam
    collectives.py  what a compiled program sends between devices                                              (*)
    plan.py         what the programs of a run need
    backend.py      makes learners

(*) Only here: PyTorch's own matmuls are fast, its modules have the checkpoint's names, and its sending stands in our code.

Not supported: model families without a record in `lockstep.models.architecture.families`.
"""

from lockstep.registry import Plugin

plugin = Plugin(
    backend="jax",
    requires=("jax", "flax", "optax"),
    install="pip install 'lockstep-rlhf[jax]'",
    components={
        "backend": {"jax": "lockstep_jax.backend:JaxBackend"},
        "policy": {
            "decoder": "lockstep_jax.policies:Decoder",
            "huggingface": "lockstep_jax.policies:HuggingFace",
            "lora": "lockstep_jax.policies:LoRA",
        },
    },
)
