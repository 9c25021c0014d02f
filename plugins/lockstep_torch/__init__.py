"""PyTorch: backend, policies and learner. Sibling of ``lockstep_jax``, file for file but the last.

backend.py      device, precision, what runs where
decoder.py      the network of policies that start from scratch; networks of transformers behind the same face
generation.py   sampling with a KV cache
model.py        logprobs, entropy, values, scores; loading and saving
policies.py     what the configuration names: decoder, huggingface, lora
learner.py      gradients and Adam
classifier.py   public reward models that are encoders; JAX has no such file
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
