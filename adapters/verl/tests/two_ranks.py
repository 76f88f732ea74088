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
import parity_plugins
import torch
from test_parity import IDLE, IDLE_SUFFIX, OTHERWISE, STACKS

from rlplugins.testing.parity import STEPS, Case, draw


def main() -> None:
    folder, rank, port, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    side = parity.VerlSide(folder, rank, 2, port)
    found = {name: list(steps(folder, side, replace(case, dense=True))) for name, case in STACKS.items()}
    side.tokens = smaller_share(STACKS["p3o"])
    for name in IDLE:
        found[name + IDLE_SUFFIX] = list(steps(folder, side, replace(STACKS[name], dense=True)))
    for suffix, (engine, names) in OTHERWISE.items():
        side = parity.VerlSide(folder, rank, 2, port, **engine)
        for name in names:
            found[name + suffix] = list(steps(folder, side, replace(STACKS[name], dense=True)))
    if rank == 0:
        torch.save(found, output / "gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def steps(folder: Path, side: parity.VerlSide, case: Case) -> Iterator[dict[str, Any]]:
    """Loss and gradient of each step, and what a plugin was told of gradients."""
    parity_plugins.FOUND.clear()
    local = parity.local_side(folder, case)
    side.begin(case)
    for number in range(STEPS):
        drawn = draw(case, number, 259, parity.POOL)
        _, entropy = side.old_log_probs(drawn)
        made = side.step(drawn, number, entropy, local.old_log_probs(drawn), micro=4)
        products = [(asked.products, asked.norms) for asked in parity_plugins.FOUND[number:]]
        yield {"loss": made.loss, "gradient": made.gradient, "products": products[0] if products else None}


def smaller_share(case: Case) -> int:
    """Tokens of the first step's smaller half: as the limit of a micro-batch it gives one rank one, the other several."""
    drawn = draw(case, 0, 259, parity.POOL)
    tokens = torch.tensor([len(prompt) for prompt in drawn.prompts]) + torch.tensor(parity.response_lengths(drawn))
    halves = tokens.view(2, -1).sum(1)
    assert int(halves.min()) < int(halves.max())
    return int(halves.min())


main()
