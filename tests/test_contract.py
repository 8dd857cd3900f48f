"""What programs do that follow the documented surface to the letter, in combinations that are
seldom seen, and what they are told where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_jax as ckpt

# --- views ------------------------------------------------------------------------------


class Switch:
    """An object of which a predicate accepts some instances and not others."""

    def __init__(self, x: Any, accepted: bool):
        self.x, self.accepted = x, accepted


def test_a_predicate_that_refuses_one_instance_is_asked_about_the_next(tmp_path: Path):
    with ckpt.registration_scope():
        ckpt.register_view(
            lambda obj: isinstance(obj, Switch) and obj.accepted,
            children=lambda switch: {"x": switch.x},
            rebuild=lambda switch, new: Switch(new["x"], True),
        )
        with pytest.raises(ckpt.UnsaveableError, match="has no view"):
            ckpt.save(tmp_path / "refused", Switch(jnp.ones(2), False))
        path = ckpt.save(tmp_path / "accepted", Switch(jnp.ones(2), True))
        assert ckpt.restore(path, Switch(jnp.zeros(2), True)).x.tolist() == [1, 1]


def test_a_module_can_be_bound_as_the_error_about_an_unbound_one_says(tmp_path: Path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(2)(x)

    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(ckpt.UnsaveableError, match=r"module\.bind"):
        ckpt.save(tmp_path / "unbound", {"model": model})
    path = ckpt.save(tmp_path / "bound", {"model": model.bind(variables)})
    assert ckpt.load(path)["model"]["Dense_0"]["params"]["kernel"].shape == (3, 2)


@pytest.mark.parametrize("name", ["type_or_predicate", "children", "rebuild"])
def test_a_view_of_anything_but_functions_is_refused_at_once(name: str):
    given: dict[str, Any] = {"type_or_predicate": Switch, "children": vars, "rebuild": vars}
    given[name] = 3
    kind = given.pop("type_or_predicate")
    with pytest.raises(TypeError, match=f"{name} must be callable, got 3"):
        ckpt.register_view(kind, **given)
