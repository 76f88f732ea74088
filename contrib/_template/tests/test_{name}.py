"""Facts about {slug}: first the numbers of the paper or of its authors' code."""

from rlplugins.testing import conformance

# what every plugin must do; name every configuration that turns a hook on or off: [{}, {"option": value}]

test_conformance = conformance("{slug}")
