"""Linen's modules.

The children of a module that is bound to variables are its submodules, and its own variables by
collection: `encoder/Dense_0/params/kernel`. A restore gives the module, bound to the new
variables. A module that is not bound has no state.
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
    """The variables of one submodule: {collection: the submodule's part of the tree}."""

    variables: Mapping[str, Mapping[str, Any]]

    def submodules(self) -> list[str]:
        """The names that have variables below them, in any collection."""
        names = [
            name for tree in self.variables.values() for name, x in tree.items() if _is_tree(x)
        ]
        return list(dict.fromkeys(names))

    def submodule(self, name: str) -> _Scope:
        return _Scope({c: t[name] for c, t in self.variables.items() if _is_tree(t.get(name))})

    def children(self) -> list[tuple[Label, Any]]:
        scopes = [(name, self.submodule(name)) for name in self.submodules()]
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


class LinenModuleView(View):
    """A module that is bound to variables, or a description of a computation without any."""

    container = "dict"

    def children(self, obj: linen.Module) -> Iterable[tuple[Label, Any]]:
        return () if obj.scope is None else _Scope(obj.variables).children()

    def rebuild(self, obj: linen.Module, changed: Mapping[Label, Any]) -> Any:
        module, variables = obj.unbind()
        return module.bind(_Scope(variables).replaced(changed).variables)

    def values(self, obj: linen.Module) -> Mapping[str, Any]:
        if obj.scope is not None:
            return {}
        raise NoState(
            f"a {type(obj).__qualname__} that is not bound to variables has no state: save the "
            "variables, or module.bind(variables)"
        )


add_view(linen.Module, LinenModuleView())
add_view(_Scope, ScopeView())
