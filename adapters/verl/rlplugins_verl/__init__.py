"""rlplugins in verl: the same plugins in an existing run, by one flag.

Nothing is imported here: verl loads parts of this package in every one of its processes.
"""
