"""JAX and XLA: backend, policies and learner. Sibling of ``lockstep_torch``: the same files in the same order. Each file imports
only from earlier ones.

    mesh.py         several devices: sharded parameters and rows
    device.py       precision, memory, and the cache of compiled programs
    attention.py    attention and masks
    products.py     matmuls in the form that XLA runs fast                                                     (*)
    network.py      what the network is made from: its specification, positions, dropout, the scalar head
    layers.py       the layers of every family of `lockstep.models.architecture`, with or without adapters
    decoder.py      our own network, in flax.nnx
    parameters.py   converts its parameters to and from checkpoint names                                       (*)
    generation.py   sampling with a KV cache, one compiled program
    model.py        logprobs, entropy, values, scores; loading and saving
    policies.py     the policies that a configuration can name: decoder, huggingface, lora
    learner.py      gradients and Adam
    collectives.py  what a compiled program sends between devices                                              (*)
    plan.py         memory and traffic that the programs of a run need
    backend.py      creates learners

(*) JAX only: PyTorch's own matmuls are fast, its modules have the checkpoint's names, and our code calls its collectives itself.

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
