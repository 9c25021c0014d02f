"""PyTorch: backend, policies and learner. Sibling of ``lockstep_jax``: the same files in the same order. Each file imports only
from earlier ones.

    mesh.py                 several processes: messages, sharded weights and rows
    pieces.py               operations between matmuls, which torch.compile can fuse                           (*)
    device.py               precision, device and threads
    attention.py            attention, masks, and rows without their padding
    network.py              what every network has: its interface, positions, dropout, the scalar head
    layers.py               the layers of our own network
    decoder.py              our own network, in Llama's shape
    transformers_network.py networks of transformers behind the same interface                                 (*)
    lora.py                 peft's adapter layers in either network                                            (*)
    generation.py           sampling with a KV cache
    model.py                logprobs, entropy, values, scores; loading and saving
    classifier.py           public reward models that are encoders                                             (*)
    policies.py             the policies that a configuration can name: decoder, huggingface, lora
    learner.py              gradients and Adam
    plan.py                 memory and traffic that the calls of a run need
    backend.py              creates learners

(*) Torch only: XLA fuses such operations by itself, and transformers and peft run on PyTorch. The JAX plugin runs the families
that it knows, and their adapters, in its own decoder.
"""

from lockstep.registry import Plugin

plugin = Plugin(
    backend="torch",
    requires=("torch", "array_api_compat"),
    install="pip install 'lockstep-rlhf[torch]'",
    components={
        "backend": {"torch": "lockstep_torch.backend:TorchBackend"},
        "policy": {
            "decoder": "lockstep_torch.policies:Decoder",
            "huggingface": "lockstep_torch.policies:HuggingFace",
            "lora": "lockstep_torch.policies:LoRA",
        },
    },
)
