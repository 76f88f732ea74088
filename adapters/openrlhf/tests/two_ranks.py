"""One of two ranks: `two_ranks.py INPUTS RANK PORT OUTPUT`; rank 0 writes what the update gave."""

import sys
from dataclasses import replace
from pathlib import Path

import openrlhf_side
import torch
from conftest import platform  # noqa: F401  (the CPU as a device)
from openrlhf_side import OpenRLHFSide

from rlplugins.testing import parity


def main() -> None:
    folder, rank, port, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    openrlhf_side.join(rank, 2, port)
    from test_parity import GRADIENTS, STACKS, asking, local_side

    torch.set_num_threads(1)
    found: dict[str, list[dict[str, object]]] = {}
    for name, plain in STACKS.items():
        case = replace(plain, dense=True)
        local = local_side(folder, case)
        side = OpenRLHFSide(folder, case, micro=4, rank=rank, ranks=2)
        products = asking(side) if name in GRADIENTS else []
        for number in range(parity.STEPS):
            drawn = parity.draw(case, number, 259, 24)
            entropy = side.old_log_probs(drawn)[1]
            made = side.step(drawn, number, local.old_log_probs(drawn))
            told = [(item.products, item.norms) for item in products[-1:]]
            found.setdefault(name, []).append(
                {
                    "loss": made.loss,
                    "gradient": made.gradient,
                    "entropy": entropy,
                    "products": told[0] if told else None,
                }
            )
    if rank == 0:
        torch.save(found, output / "gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
