"""PyTorch: backend, policies and learner. Sibling of ``lockstep_jax``: the same files in the same order, each of which imports
from earlier ones only.

    mesh.py                 several processes: messages, and weights and rows divided
    pieces.py               what lies between matmuls, for torch.compile to join                                    (*)
    device.py               precision, what runs where
    attention.py            attention, what its queries see, and rows without their padding
    decoder.py              the network of policies that start from scratch, in Llama's shape
    transformers_network.py networks of transformers behind the same interface                                      (*)
    lora.py                 peft's adapter layers in either network                                            (*)
    generation.py           sampling with a KV cache
    model.py                logprobs, entropy, values, scores; loading and saving
    classifier.py           public reward models that are encoders                                             (*)
    policies.py             the configuration's choices: decoder, huggingface, lora
    learner.py              gradients and Adam
    plan.py                 what the calls of a run need
    backend.py              makes learners

(*) Only here: XLA joins such pieces by itself, and transformers and peft run on PyTorch. JAX runs the families that it knows, and
their adapters, in its own decoder.
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
