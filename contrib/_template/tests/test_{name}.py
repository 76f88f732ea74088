"""Facts about {slug}: first the numbers of the paper or of its authors' code."""

from rlplugins import Stack


def test_a_stack_can_run_it() -> None:
    assert [plugin.name for plugin in Stack(["{slug}"]).plugins] == ["{slug}"]
