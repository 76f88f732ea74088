"""Loaded by Python itself where this folder is on PYTHONPATH: in every process of a run, whoever starts it."""

import os

if os.environ.get("RLPLUGINS_OPENRLHF_CPU") == "1":
    from rlplugins_openrlhf.cpu import platform

    platform.install()
