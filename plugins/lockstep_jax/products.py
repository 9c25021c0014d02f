"""Matrix products in a precision of one's choice, and what is kept of them for the gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(dtype: Any, platform: str, x: Array, kernel: Array) -> Array:
    """[rows, inputs] @ [inputs, outputs] -> float32: of operands rounded to ``dtype``, summed in float32. The gradients are such
    products too; on CPUs their operands are transposed first and multiplied then. Left to itself XLA's CPU compiler multiplies
    transposed operands as they lie, at half to three quarters of the speed, and slower still where x has more axes in front
    than one. Its fast products of bfloat16 (a quarter of float32's time where the CPU has them) are of untransposed operands
    and sums in float32 only."""
    return _product(dtype, x, kernel)


def _product(dtype: Any, x: Array, y: Array) -> Array:
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _product_forward(dtype: Any, platform: str, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    x = checkpoint_name(x.astype(dtype), "operand")
    return _product(dtype, x, kernel), (x, kernel)


def _product_backward(dtype: Any, platform: str, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Rounded first: half of it to move in bfloat16.
    x, kernel = (transposed(operand.astype(dtype), platform) for operand in operands)
    return _product(dtype, gradient, kernel), _product(dtype, x, gradient)


product.defvjp(_product_forward, _product_backward)


def transposed(matrix: Array, platform: str) -> Array:
    """Transposed, and on CPUs in memory too. Without the axis that comes and goes XLA would note the transposition as a layout,
    and take a product of bfloat16 for one that it has to make of float32. Accelerators multiply turned operands as they lie."""
    return jax.lax.optimization_barrier(matrix.T[None])[0] if platform == "cpu" else matrix.T


PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names("operand")
)
"""What is kept for the gradient of a layer that is not checkpointed: see `product`."""
