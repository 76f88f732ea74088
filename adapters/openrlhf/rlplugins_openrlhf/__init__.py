"""rlplugins in OpenRLHF: the same plugins in an existing run, by one word and one flag.

Nothing is imported here: several processes of OpenRLHF load parts of this package.
"""
