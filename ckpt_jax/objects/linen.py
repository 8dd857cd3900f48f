"""Linen's modules. A module that is bound to variables is seen as its submodules and, in each,
its own variables by collection: `encoder/Dense_0/params/kernel`. What is restored is the module
bound to the new variables. A module that is not bound has no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import linen

from ckpt_jax.graph.labels import Label
from ckpt_jax.objects.views import NoState, View, add_view


@dataclass(frozen=True, slots=True)
class _Scope:
    """What a module's variables hold for one submodule: {collection: its part of the tree}."""

    variables: Mapping[str, Mapping[str, Any]]

    def submodules(self) -> list[str]:
        """Names below which there are variables, in any collection."""
        names = [
            name for tree in self.variables.values() for name, x in tree.items() if _is_tree(x)
        ]
        return list(dict.fromkeys(names))

    def children(self) -> list[tuple[Label, Any]]:
        scopes = [
            (
                name,
                _Scope(
                    {
                        c: tree[name]
                        for c, tree in self.variables.items()
                        if _is_tree(tree.get(name))
                    }
                ),
            )
            for name in self.submodules()
        ]
        own = [
            (collection, leaves)
            for collection, tree in self.variables.items()
            if (leaves := {name: x for name, x in tree.items() if not _is_tree(x)})
        ]
        return [*scopes, *own]

    def replaced(self, changed: Mapping[Label, Any]) -> _Scope:
        new: dict[str, dict[str, Any]] = {c: dict(tree) for c, tree in self.variables.items()}
        for name, child in changed.items():
            if isinstance(child, _Scope):
                for collection, tree in child.variables.items():
                    new[collection][str(name)] = tree
            else:
                new[str(name)].update(child)
        return _Scope(new)


def _is_tree(value: Any) -> bool:
    return isinstance(value, Mapping)


class ScopeView(View):
    container = "dict"

    def children(self, obj: _Scope) -> Iterable[tuple[Label, Any]]:
        return obj.children()

    def rebuild(self, obj: _Scope, changed: Mapping[Label, Any]) -> Any:
        return obj.replaced(changed)


class BoundView(View):
    """A module bound to variables."""

    container = "dict"

    def children(self, obj: linen.Module) -> Iterable[tuple[Label, Any]]:
        return _Scope(obj.variables).children()

    def rebuild(self, obj: linen.Module, changed: Mapping[Label, Any]) -> Any:
        module, variables = obj.unbind()
        return module.bind(_Scope(variables).replaced(changed).variables)


class UnboundView(View):
    """A module without variables: a description of a computation, which no checkpoint can hold."""

    def values(self, obj: linen.Module) -> Mapping[str, Any]:
        raise NoState(
            f"a {type(obj).__qualname__} that is not bound to variables has no state: save the "
            "variables, or module.bind(variables)"
        )


def _is_bound(obj: Any) -> bool:
    return isinstance(obj, linen.Module) and obj.scope is not None


add_view(linen.Module, UnboundView())
add_view(_is_bound, BoundView())
add_view(_Scope, ScopeView())
