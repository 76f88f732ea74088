"""One of two ranks of a mini-batch: `two_ranks.py FOLDER RANK PORT OUTPUT`; the first writes losses and gradients."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from rlplugins_verl.cpu.launch import environment

os.environ.update(environment())

import parity
import torch
from test_parity import STACKS


def main() -> None:
    folder, rank, port, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    side = parity.VerlSide(folder, rank, 2, port)
    found: dict[str, list[dict]] = {}
    for name, case in STACKS.items():
        case = replace(case, dense=True)
        local = parity.LocalSide(folder, case)
        side.begin(case)
        found[name] = []
        for number in range(parity.STEPS):
            drawn = parity.draw(case, number, 259, 24)
            _, entropy = side.old_log_probs(drawn)
            made = side.step(drawn, number, entropy, local.old_log_probs(drawn), micro=4)
            found[name].append({"loss": made.loss, "gradient": made.gradient})
    if rank == 0:
        torch.save(found, output / "gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
