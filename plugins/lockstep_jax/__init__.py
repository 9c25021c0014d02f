"""JAX and XLA: backend, policies and learner. Sibling of ``lockstep_torch``, file for file.

    backend.py      device, precision, where compiled programs are kept
    decoder.py      the network in flax.nnx: Llama's and GPT-2's shapes, its parameters to and from checkpoint names
    generation.py   sampling with a KV cache, one compiled program
    model.py        logprobs, entropy, values, scores; loading and saving
    policies.py     what the configuration names: decoder, huggingface, lora
    learner.py      gradients and Adam

Left out so far: sharding over several devices, model families beyond these two.
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
