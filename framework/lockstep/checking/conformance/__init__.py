"""The conformance kit: checks that every backend, policy, reward model, environment, engine, labeler, attacker and algorithm must
pass. To run them on your own component:

    lockstep check reinforce                       one plugin, on every backend that is installed
    lockstep check decoder --backend jax --precision bfloat16
    lockstep check torch backend.mesh.fsdp=2       on several devices, or several processes, which it starts

or in a package's own tests:

    @pytest.mark.conformance("algorithm", "reinforce")
    def test_conformance(conformance):
        conformance()

kit.py            what a check is, and how checks run
world.py          a world small enough to check by hand, on any backend
subjects.py       the components to check, set up in that world
backends/         gradients, Adam, micro-batches, restoring
meshes.py         several devices or processes compute what one device computes
policies/         probabilities, sampling, padding, heads, checkpoints
reward_models.py  one finite score per response, whatever the batch; failures are never hidden
environments.py   any turn gets a reply, the same each time, independent of other episodes
engines.py        the policy's own distribution, by the newest weights
labelers.py       ranks of all completions, whoever wrote them, whatever else is labelled
attackers.py      dialogues that end with the user's turn, from goal, place and seed alone
algorithms/       rewards, masks, steps, seeds and resuming, seen from what crosses the waist
"""

from lockstep.checking.conformance.kit import CHECKS, Check, Inapplicable, Outcome, Violation, checks, conform
from lockstep.checking.conformance.subjects import subject

__all__ = ["CHECKS", "Check", "Inapplicable", "Outcome", "Violation", "checks", "conform", "subject"]
