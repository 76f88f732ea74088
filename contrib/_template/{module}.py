"""{description}."""

from rlplugins import Plugin, hookimpl


class {class_name}(Plugin):
    """{description}."""

    name = "{slug}"
