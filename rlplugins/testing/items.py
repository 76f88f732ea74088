"""Conformance checks as tests of pytest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from rlplugins.testing.conformance import Check, Conformance, NonConforming, Skip, run
from rlplugins.testing.trial import Subject


class Suite(pytest.Collector):
    """What a module binds to a name with `conformance(...)`: one test for each check and configuration."""

    def __init__(self, *, declared: Conformance, **rest: Any) -> None:
        super().__init__(**rest)
        self.declared = declared

    def collect(self) -> Iterable[pytest.Item]:
        """The tests that concern the plugin."""
        for name, check, subject in self.declared.tests():
            reason = self.declared.unless.get(check.name)
            yield ConformanceTest.from_parent(self, name=name, check=check, subject=subject, reason=reason)


class ConformanceTest(pytest.Item):
    """One check of a plugin in one configuration."""

    def __init__(self, *, check: Check, subject: Subject, reason: str | None, **rest: Any) -> None:
        super().__init__(**rest)
        self.check, self.subject, self.reason = check, subject, reason

    def runtest(self) -> None:
        """Run the check, unless the method is defined otherwise."""
        if self.reason:
            pytest.skip(self.reason)
        try:
            run(self.check, self.subject)
        except Skip as error:
            pytest.skip(str(error))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What to do, without the inside of the kit; the whole traceback of any other error."""
        if isinstance(excinfo.value, NonConforming) and excinfo.value.__cause__ is None:
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where the line is, and which check this is."""
        return self.path, None, f"{self.subject.plugin.name}: {self.name}"
