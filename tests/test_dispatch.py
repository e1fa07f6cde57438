"""The choice by platform: what `force` traces inside is not used outside, and nothing else asks for the platform."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from se_flax import UserError
from se_flax.lowering.dispatch import PLATFORMS, by_platform, force

ROOT = Path(__file__).parents[1]


def which(x):
    """0 on a CPU, 1 on a TPU, 2 elsewhere; times x."""
    forms = {"cpu": lambda x: 0 * x, "tpu": lambda x: 1 * x}
    return by_platform(x, **forms, default=lambda x: 2 * x)


@jax.custom_vjp
def custom(x):
    return which(x)


custom.defvjp(lambda x: (which(x), None), lambda _, gradient: (which(gradient),))

# Ways to a function of which JAX keeps what it traced.
CACHED = {
    "jit": jax.jit(which),
    "jit in jit": jax.jit(lambda x: jax.jit(which)(x)),
    "grad": jax.jit(jax.grad(which)),
    "checkpoint": jax.grad(jax.checkpoint(which)),
    "scan": lambda x: jax.lax.scan(lambda x, _: (which(x), None), x, length=1)[0],
    "cond": lambda x: jax.lax.cond(x > 0, which, which, x),
    "custom derivative": jax.jit(jax.grad(custom)),
    "vmap": lambda x: jax.jit(jax.vmap(which))(x[None])[0],
}


@pytest.mark.parametrize("call", CACHED.values(), ids=CACHED)
def test_force_no_trace_is_used_in_another_context(call):
    one = jnp.ones(())
    for _ in range(2):
        assert call(one) == 0
        for platform, result in {"tpu": 1, "cuda": 2, "rocm": 2, "cpu": 0}.items():
            with force(platform):
                assert call(one) == result
    with force("tpu"):
        with force("cuda"):
            assert call(one) == 2
        assert call(one) == 1


def test_force_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), force("tpu"):
        raise ZeroDivisionError
    assert which(jnp.ones(())) == 0


def test_force_traces_one_form_and_a_program_keeps_it():
    with force("tpu"):
        lowered, jaxpr = jax.jit(which).lower(jnp.ones(())), jax.make_jaxpr(which)(jnp.ones(()))
    assert "cond" not in str(jaxpr) and "cond" in str(jax.make_jaxpr(which)(jnp.ones(())))
    assert lowered.compile()(jnp.ones(())) == 1


@pytest.mark.parametrize("platform", ["gpu", "TPU", "", None])
def test_force_refuses_other_platforms(platform):
    message = f"got platform={platform!r}; give one of {', '.join(PLATFORMS)}"
    with pytest.raises(UserError, match=re.escape(message)), force(platform):
        pass


def test_only_dispatch_asks_jax_for_the_platform():
    found = {
        str(path.relative_to(ROOT))
        for package in ("se_flax", "train")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\blax\.platform_dependent\(", path.read_text())
    }
    assert found == {"se_flax/lowering/dispatch.py"}
