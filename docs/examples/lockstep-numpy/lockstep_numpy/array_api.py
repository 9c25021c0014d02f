"""The namespace ``xp`` that losses receive: autograd.numpy, plus the Array API functions that it lacks."""

from __future__ import annotations

from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive
from autograd.numpy.numpy_vjps import unbroadcast_f

from lockstep.interfaces import Array


def __getattr__(name: str) -> Any:
    return getattr(anp, name)


def astype(x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


def clip(x: Array, min: Any = None, max: Any = None) -> Array:
    return anp.clip(x, min, max)


# autograd's own `where` gives broadcast arguments a gradient of the result's shape.
where = primitive(np.where)
defvjp(
    where,
    None,
    lambda ans, c, x, y: unbroadcast_f(x, lambda g: where(c, g, anp.zeros_like(g))),
    lambda ans, c, x, y: unbroadcast_f(y, lambda g: where(c, anp.zeros_like(g), g)),
)

concat, permute_dims, pow = anp.concatenate, anp.transpose, anp.power
