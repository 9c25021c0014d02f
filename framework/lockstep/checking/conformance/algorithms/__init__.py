"""What an algorithm does, seen from what crosses the waist: which tokens count, where rewards land, how many steps it takes,
which seeds it uses, and that a restart changes nothing.

The algorithm's `Traits` decide which checks apply. In addition, a check that sets a configuration key (``gamma``,
``kl_target``) or reads a batch array (``returns``) or a metric (``objective/kl``) applies to every algorithm with a key, array
or metric of that name. `docs/metrics.md` lists the names.
"""

from __future__ import annotations

import importlib

for _part in ("steps", "masks", "reinforcement", "groups", "preferences", "reward_modelling", "failures"):  # in running order
    importlib.import_module(f"{__name__}.{_part}")
