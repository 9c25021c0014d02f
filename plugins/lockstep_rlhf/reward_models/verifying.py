"""The child process of `lockstep_rlhf.reward_models.mathematics`: a line of JSON in, [gold, answer, seconds]; a line out.

math-verify's `verify` is not symmetric: the gold answer comes first. Gold answers are often bare LaTeX, which `parse` reads only
between dollars. Answers are read where math-verify looks for them: all boxes together, else the last formula or number.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys

MEMORY = 4 * 2**30
"""Limit of the address space, in bytes: some expressions take any amount."""
GRACE = 30
"""Seconds past a comparison's limit after which the process ends by itself, in case its parent has gone."""


def outcome(gold: str, answer: str) -> bool | str:
    from math_verify import parse, verify

    bare = not any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\["))
    try:
        right = parse(f"${gold}$" if bare else gold, parsing_timeout=None)
        if all(isinstance(each, str) for each in right):  # text that it found but could not read
            return "no_gold"
        found = parse(answer, parsing_timeout=None)
        return bool(verify(right, found, timeout_seconds=None, raise_on_error=True)) if found else "no_answer"
    except Exception:  # whatever sympy raises; MemoryError and RecursionError too
        return "failed"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that no other output is taken for an answer
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  # before the clock runs

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        signal.alarm(math.ceil(seconds) + GRACE)
        print(json.dumps(outcome(gold, answer)), file=answers, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
