"""What needs OpenRLHF runs in an environment of its own (`make test` builds it); elsewhere only the rest is collected."""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore: list[str] = []
if importlib.util.find_spec("openrlhf") is None:
    needing = ("parity", "columns", "doctor", "forward", "given", "runs", "runs_long")
    collect_ignore += [f"test_{name}.py" for name in needing]
else:
    from rlplugins_openrlhf.cpu import platform
    from rlplugins_openrlhf.cpu.launch import environment

    os.environ.update(environment())
    platform.install()
