"""One of two ranks of a mini-batch: `two_ranks.py FOLDER RANK PORT OUTPUT`; the first writes losses and gradients."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlplugins_verl.cpu.launch import environment

os.environ.update(environment())

import parity
import torch
from test_parity import IDLE, STACKS

from rlplugins.testing.parity import STEPS, Case, draw


def main() -> None:
    folder, rank, port, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    side = parity.VerlSide(folder, rank, 2, port)
    found: dict[str, list[dict]] = {}
    for name, case in STACKS.items():
        found[name] = list(steps(folder, side, replace(case, dense=True)))
    side.tokens = smaller_share(STACKS["p3o"])
    found[IDLE] = list(steps(folder, side, replace(STACKS["p3o"], dense=True)))
    if rank == 0:
        torch.save(found, output / "gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def steps(folder: Path, side: parity.VerlSide, case: Case) -> Iterator[dict[str, Any]]:
    """Loss and gradient of each step."""
    local = parity.local_side(folder, case)
    side.begin(case)
    for number in range(STEPS):
        drawn = draw(case, number, 259, parity.POOL)
        _, entropy = side.old_log_probs(drawn)
        made = side.step(drawn, number, entropy, local.old_log_probs(drawn), micro=4)
        yield {"loss": made.loss, "gradient": made.gradient}


def smaller_share(case: Case) -> int:
    """Tokens of the first step's smaller half: as the limit of a micro-batch it gives one rank one, the other several."""
    drawn = draw(case, 0, 259, parity.POOL)
    tokens = torch.tensor([len(prompt) for prompt in drawn.prompts]) + torch.tensor(parity.response_lengths(drawn))
    halves = tokens.view(2, -1).sum(1)
    assert int(halves.min()) < int(halves.max())
    return int(halves.min())


main()
