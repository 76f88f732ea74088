"""Become another program that the system kills when the process that started it dies.

    python guarded.py <pid of the parent> <program> <arguments>...

Only Linux has such a death signal; elsewhere the program just starts. It is a small program of its own, and
not a function that runs between fork and exec, because the parent has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the death signal, and replace this process by the program."""
    parent, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            sys.exit(f"process {parent} died before {program[0]} was started")
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"{program[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
