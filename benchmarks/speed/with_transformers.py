"""Contestant: transformers' `generate`."""

import torch
import transformers
from transformers import AutoModelForCausalLM
from worker import WORDS, Contestant


def main() -> None:
    contestant = Contestant()
    work, options = contestant.work, contestant.options
    torch.set_num_threads(options["threads"])
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options["precision"]]
    model = AutoModelForCausalLM.from_pretrained(contestant.models / work.size / "policy", dtype=dtype).to(contestant.device)
    prompts = torch.randint(0, WORDS, (work.rows, work.prompt), device=contestant.device)
    if contestant.device == "cuda":
        contestant.wait, contestant.peak_bytes = torch.cuda.synchronize, torch.cuda.max_memory_allocated

    def step() -> None:
        out = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=work.response,
            min_new_tokens=work.response,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=0,
        )
        assert out.shape == (work.rows, work.prompt + work.response)

    contestant.serve(step, torch=torch.__version__, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
