"""Write the models and the tokenizer of the benchmark as Hugging Face folders, which every contestant reads.

    python benchmarks/speed/models.py FOLDER [--smollm2 models/smollm2]

Weights are random for tiny and miniature: speed does not depend on them. SmolLM2's folder is made by `../smollm2.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from worker import SIZES

OF_CPUS = ["tiny", "miniature", "width64", "width256", "width512", "smollm2"]


def write(folder: Path, names: list[str], *, dtype: str = "float32", smollm2: Path | None = None, device: str = "cpu") -> None:
    for name in names:
        size = SIZES[name]
        if name == "smollm2":
            if smollm2 is None:
                continue
            config = AutoConfig.from_pretrained(smollm2)
            policy = LlamaForCausalLM.from_pretrained(smollm2, dtype="float32")
        else:
            config = LlamaConfig(
                vocab_size=size.vocab_size,
                hidden_size=size.hidden_size,
                intermediate_size=size.intermediate_size,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                num_key_value_heads=size.kv_heads,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
            )
            torch.manual_seed(0)
            with torch.device(device):
                policy = LlamaForCausalLM(config).to(getattr(torch, dtype))
        vocab_size = config.vocab_size
        config.num_labels, config.pad_token_id, config.eos_token_id = 1, None, None
        policy.config.pad_token_id = policy.config.eos_token_id = None
        policy.generation_config.eos_token_id = policy.generation_config.pad_token_id = None
        with torch.device(device):
            reward = LlamaForSequenceClassification(config).to(getattr(torch, dtype))
        reward.model.load_state_dict(policy.model.state_dict())
        for kind, model in (("policy", policy), ("reward", reward)):
            shutil.rmtree(folder / name / kind, ignore_errors=True)
            model.save_pretrained(folder / name / kind)
            tokenizer(folder / name / kind, vocab_size)
        print(f"{folder / name}: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f} million parameters")


def tokenizer(folder: Path, vocab_size: int) -> None:
    """One token per word. EOS and padding have ids that no model can draw, so every response has its full length."""
    vocabulary = {f"w{i}": i for i in range(vocab_size)} | {"<eos>": vocab_size, "<pad>": vocab_size + 1}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smollm2", type=Path)
    arguments = parser.parse_args()
    write(arguments.folder, OF_CPUS, smollm2=arguments.smollm2)
