"""What needs verl runs in an environment of its own (`make test` builds it); elsewhere only the rest is collected."""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore: list[str] = []
if importlib.util.find_spec("transfer_queue") is None:
    collect_ignore += [
        "test_parity.py",
        "test_columns.py",
        "test_config.py",
        "test_driver.py",
        "test_given.py",
        "test_runs.py",
        "test_runs_long.py",
        "test_doctor.py",
    ]
else:
    from rlplugins_verl.cpu.launch import environment

    os.environ.update(environment())
