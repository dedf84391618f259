"""The parameters and submodules of offloaded experts: they can be listed, but not replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from runtime.engine.guards.placeholder import REMEDY, Placeholder


class Contents(dict[str, Any]):
    """A module's `_parameters` or `_modules`, of which some cannot be set or deleted.

    fixed: their names; None for all. owner: the module's path, for the message.
    """

    def __init__(
        self, values: Mapping[str, Any], owner: str, fixed: Collection[str] | None
    ) -> None:
        super().__init__(values)
        self._owner, self._fixed = owner, fixed

    def __setitem__(self, name: str, value: Any) -> None:
        if self._is_fixed(name) and not self._is_same(name, value):
            self._refuse(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if self._is_fixed(name):
            self._refuse(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        if self._is_fixed(name):
            self._refuse(name)
        return super().pop(name, *default)

    def _is_fixed(self, name: str) -> bool:
        return self._fixed is None or name in self._fixed

    def _is_same(self, name: str, value: Any) -> bool:
        own = self.get(name)
        if isinstance(own, Placeholder) and isinstance(value, Placeholder):
            return own.origin is value.origin
        return name in self and own is value

    def _refuse(self, name: str) -> NoReturn:
        raise ValueError(
            f"{self._owner}.{name} cannot be replaced while the experts are offloaded; {REMEDY}"
        )
