"""Losses and their gradients by TRL, for policy gradients and preference methods, as numbers for tests/test_outsiders.py.

TRL is no dependency of Lockstep: it runs in an environment of its own, with nothing of Lockstep.

    python3.11 -m venv /tmp/trl_env
    /tmp/trl_env/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0
    /tmp/trl_env/bin/python benchmarks/outsiders/trl_policy_losses.py tests/fixtures/outsiders

It writes trl_policy_losses.json: arrays [rows, columns] of log-probabilities, and what the trainers' own `_compute_loss` makes of
them. The trainers are not built: a stand-in has the attributes that this method reads, and its model returns the given
log-probabilities. So the code under test is TRL's, and the network is not in the way.
"""

import collections
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

ROWS, COLUMNS, LIMIT = 8, 7, 10
"""Rows of completions, columns of the block, and the longest completion that may be generated."""

same = lambda x, *_, **__: x  # noqa: E731
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), num_processes=1, gather=same, gather_for_metrics=same, reduce=same,
                              sync_gradients=True)  # fmt: skip


def stand_in(**attributes) -> SimpleNamespace:
    common = {
        "model": SimpleNamespace(training=True), "accelerator": ACCELERATOR, "aux_loss_enabled": False, "use_vllm": False,
        "_metrics": {"train": collections.defaultdict(list)}, "current_gradient_accumulation_steps": 1,
    }  # fmt: skip
    return SimpleNamespace(**(common | attributes))


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    lengths = np.array([7, 3, 1, 5, 6, 2, 4, 7])
    mask = np.arange(COLUMNS) < lengths[:, None]
    old = rng.normal(-2, 0.7, mask.shape)
    found = {"old": old, "new": old + rng.normal(0, 0.25, mask.shape), "ref": old + rng.normal(0, 0.3, mask.shape)}
    return {"mask": mask} | {name: np.where(mask, value, 0).astype(np.float32) for name, value in found.items()}


def with_gradient(x: dict[str, np.ndarray], loss) -> dict:
    leaf = torch.tensor(x["new"], requires_grad=True)
    value = loss(leaf)
    value.backward()
    return {"loss": float(value.detach()), "gradient": leaf.grad.tolist()}


def grpo(x: dict[str, np.ndarray], advantages: np.ndarray, **changes) -> dict:
    """One call of GRPOTrainer._compute_loss."""
    loss_type = changes.get("loss_type", "grpo")
    args = SimpleNamespace(use_bias_correction_kl=False, delta=changes.get("delta"), steps_per_generation=1)
    ids = torch.zeros(ROWS, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": torch.zeros(ROWS, COLUMNS, dtype=torch.long),
        "completion_mask": torch.tensor(x["mask"]).long(), "advantages": torch.tensor(advantages),
        "old_per_token_logps": torch.tensor(x["old"]), "ref_per_token_logps": torch.tensor(x["ref"]),
        "num_items_in_batch": torch.tensor(x["mask"].sum()),
    }  # fmt: skip

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        trainer = stand_in(
            args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
            importance_sampling_level=changes.get("level", "token"), beta=changes.get("beta", 0.0), loss_type=loss_type,
            epsilon_low=changes.get("low", 0.2), epsilon_high=changes.get("high", 0.2), max_completion_length=LIMIT,
            _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        )  # fmt: skip
        return trl.GRPOTrainer._compute_loss(trainer, None, inputs)

    return with_gradient(x, loss)


def rloo(x: dict[str, np.ndarray], advantages: np.ndarray) -> dict:
    """One call of RLOOTrainer._compute_loss before the policy has moved: the old log-probabilities are the present ones."""
    ids, new = torch.zeros(ROWS, 1, dtype=torch.long), x["new"]
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": torch.zeros(ROWS, COLUMNS, dtype=torch.long),
        "completion_mask": torch.tensor(x["mask"]).long(), "advantages": torch.tensor(advantages),
        "old_logps": torch.tensor(np.where(x["mask"], new, 0).sum(axis=1)),
    }  # fmt: skip

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        logps = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)  # noqa: E731
        trainer = stand_in(epsilon_low=0.2, epsilon_high=0.2, _get_per_token_logps_and_entropies=logps)
        return trl.RLOOTrainer._compute_loss(trainer, None, inputs)

    return with_gradient(x, loss)


def outputs(leaf: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(leaf)
    return SimpleNamespace(
        log_probs=leaf, entropy=zeros, mean_logits=zeros, logits=zeros, log_sum_sq_probs=zeros, is_top1=zeros > 0
    )


def dpo(x: dict[str, np.ndarray], kind: str, **changes) -> dict:
    """One call of DPOTrainer._compute_loss; the first half of the rows are chosen, the second half rejected."""
    mask = torch.tensor(np.pad(x["mask"], ((0, 0), (1, 0)))).long()  # TRL shifts: column 0 predicts column 1
    chosen, rejected = torch.tensor(np.where(x["mask"], x["ref"], 0).sum(axis=1)).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        trainer = stand_in(
            ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
            beta=0.1, label_smoothing=changes.get("smoothing", 0.0), use_weighting=False, _total_train_tokens=0, _tp_size=1,
            args=SimpleNamespace(),
        )  # fmt: skip
        model = lambda **_: outputs(leaf * torch.tensor(x["mask"]))  # noqa: E731
        return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)

    return with_gradient(x, loss)


def kto(x: dict[str, np.ndarray], z: float) -> dict:
    """One call of KTOTrainer._compute_loss; the first half of the rows are desirable. Its KL estimate is ``z``."""
    mask = torch.tensor(np.pad(x["mask"], ((0, 0), (1, 0)))).long()
    batch = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "label": torch.arange(ROWS) < ROWS // 2, "ref_logps": torch.tensor(np.where(x["mask"], x["ref"], 0).sum(axis=1)),
        "ref_KL_logps": torch.zeros(ROWS),
    }  # fmt: skip

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        trainer = stand_in(
            precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
            _compute_kl_logps=lambda *_: torch.full((ROWS,), z), _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(),
        )  # fmt: skip
        model = lambda **_: outputs(leaf * torch.tensor(x["mask"]))  # noqa: E731
        return trl.KTOTrainer._compute_loss(trainer, model, batch, False)

    return with_gradient(x, loss)


def means(x: dict[str, np.ndarray], leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor(x["mask"])
    return ((leaf * mask).sum(1) / mask.sum(1)).chunk(2)


def simpo(x: dict[str, np.ndarray]) -> dict:
    trainer = stand_in(loss_type="simpo", beta=2.5, simpo_gamma=1.375, label_smoothing=0.0, alpha=0.0)
    return with_gradient(x, lambda leaf: CPOTrainer.cpo_loss(trainer, *means(x, leaf))[0].mean())


def orpo(x: dict[str, np.ndarray]) -> dict:
    trainer = stand_in(beta=0.1)
    return with_gradient(x, lambda leaf: -ORPOTrainer.odds_ratio_loss(trainer, *means(x, leaf))[0].mean())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    x = arrays()
    advantages = np.random.default_rng(6).normal(size=ROWS).astype(np.float32)
    found = {
        "grpo": grpo(x, advantages),
        "grpo_kl": grpo(x, advantages, beta=0.04),
        "dr_grpo": grpo(x, advantages, loss_type="dr_grpo"),
        "dapo": grpo(x, advantages, loss_type="dapo", high=0.28),
        "cispo": grpo(x, advantages, loss_type="cispo", high=1.3),
        "gspo": grpo(x, advantages, level="sequence", low=0.03, high=0.04),
        "rloo": rloo(x, advantages),
        "dpo": dpo(x, "sigmoid"),
        "hinge": dpo(x, "hinge"),
        "ipo": dpo(x, "ipo"),
        "robust": dpo(x, "robust", smoothing=0.1),
        "simpo": simpo(x),
        "orpo": orpo(x),
        "kto": kto(x, 0.7),
    }
    fixture = {
        "source": f"TRL {trl.__version__}, torch {torch.__version__}, benchmarks/outsiders/trl_policy_losses.py", "limit": LIMIT,
        "arrays": {name: value.tolist() for name, value in x.items()}, "advantages": advantages.tolist(), "found": found,
    }  # fmt: skip
    (folder / "trl_policy_losses.json").write_text(json.dumps(fixture, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
