"""`python -m rlplugins`."""

from rlplugins.cli import main

main()
