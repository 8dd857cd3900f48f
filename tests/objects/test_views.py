"""Views that a program registers for classes of its own."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt


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


@pytest.mark.parametrize("name", ["type_or_predicate", "children", "rebuild"])
def test_a_view_of_anything_but_functions_is_refused_at_once(name: str):
    given: dict[str, Any] = {"type_or_predicate": Switch, "children": vars, "rebuild": vars}
    given[name] = 3
    kind = given.pop("type_or_predicate")
    with pytest.raises(TypeError, match=f"{name} must be callable, got 3"):
        ckpt.register_view(kind, **given)


@pytest.mark.parametrize(
    ("children", "error", "what"),
    [
        (lambda switch: 1 / 0, ZeroDivisionError, "division"),
        (lambda switch: 3, TypeError, "dict .* got 3"),
    ],
)
def test_children_that_cannot_be_listed_are_named(tmp_path, children, error, what):
    with ckpt.registration_scope():
        ckpt.register_view(Switch, children=children, rebuild=lambda switch, changed: switch)
        with pytest.raises(error, match=what) as raised:
            ckpt.save(tmp_path / "a", {"lights": [Switch.__new__(Switch)]})
    assert "lights/0" in raised.value.__notes__[0]
