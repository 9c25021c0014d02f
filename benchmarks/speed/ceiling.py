"""What the machine can do at most, measured beside the contestants: the largest rate of matrix products in float32 (and in
bfloat16, where the CPU has it) and the largest rate of reading memory."""

import time

import numpy as np
import torch
from worker import Contestant, multiplies_bfloat16

SIDES = {"cpu": 2048, "cuda": 8192}
NUMBERS = {"cpu": 64 * 2**20, "cuda": 2**30}
"""float32 numbers: far beyond the caches."""


def main() -> None:
    contestant = Contestant()
    torch.set_num_threads(contestant.options["threads"])
    device = contestant.device
    side, numbers = SIDES[device], NUMBERS[device]
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    low = a.bfloat16(), b.bfloat16()
    source = torch.ones(numbers, device=device)
    if device == "cuda":
        contestant.wait = torch.cuda.synchronize

    def rate(call, work: float, times: int) -> float:
        best = np.inf
        for _ in range(times):
            started = time.perf_counter()
            call()
            contestant.wait()
            best = min(best, time.perf_counter() - started)
        return work / best

    def measure() -> dict[str, float]:
        rates = {"flops": rate(lambda: a @ b, 2.0 * side**3, 5), "read_bytes": rate(lambda: source.sum(), 4.0 * numbers, 3)}
        if multiplies_bfloat16(device):
            rates["flops_bfloat16"] = rate(lambda: low[0] @ low[1], 2.0 * side**3, 5)
        return rates

    measure()
    contestant.ready(torch=torch.__version__)
    while True:
        contestant.await_turn()
        contestant.finished(**measure())


if __name__ == "__main__":
    main()
