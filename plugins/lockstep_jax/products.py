"""Matmuls in a chosen precision, and what they keep for the gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(dtype: Any, platform: str, x: Array, kernel: Array) -> Array:
    """[rows, inputs] @ [inputs, outputs] -> float32: inputs are rounded to ``dtype`` and summed in float32, in the gradients too.
    On CPUs, the gradients' inputs are first transposed in memory: left to itself, XLA's CPU compiler multiplies transposed inputs
    as they lie, at half to three quarters of the speed, and slower still if x has more than one leading axis. Its fast bfloat16
    matmuls (a quarter of float32's time if the CPU has the instructions) only take inputs that are not transposed and only sum in
    float32."""
    return _product(dtype, x, kernel)


def _product(dtype: Any, x: Array, y: Array) -> Array:
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _product_forward(dtype: Any, platform: str, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    x = checkpoint_name(x.astype(dtype), "operand")
    return _product(dtype, x, kernel), (x, kernel)


def _product_backward(dtype: Any, platform: str, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Round first: bfloat16 is half as much to move.
    x, kernel = (transposed(operand.astype(dtype), platform) for operand in operands)
    return _product(dtype, gradient, kernel), _product(dtype, x, gradient)


product.defvjp(_product_forward, _product_backward)


def transposed(matrix: Array, platform: str) -> Array:
    """The transpose, on CPUs also in memory. Without the temporary axis, XLA would record the transpose as a layout and treat a
    bfloat16 matmul as one that it must do in float32. Accelerators multiply transposed inputs directly."""
    return jax.lax.optimization_barrier(matrix.T[None])[0] if platform == "cpu" else matrix.T


PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("operand", "attended"),
)
"""What a layer without checkpointing keeps for the gradient: see `product` and `lockstep_jax.attention.in_blocks`."""
