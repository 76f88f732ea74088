"""The pytest plugin of rlplugins; it imports rlplugins (and torch) only where a test module uses the conformance kit."""

from __future__ import annotations

from typing import Any


def pytest_pycollect_makeitem(collector: Any, name: str, obj: object) -> Any:
    """Collect what `rlplugins.testing.conformance` returned."""
    if type(obj).__module__ != "rlplugins.testing.conformance" or type(obj).__name__ != "Conformance":
        return None
    from rlplugins.testing.items import Suite

    return Suite.from_parent(collector, name=name, declared=obj)
