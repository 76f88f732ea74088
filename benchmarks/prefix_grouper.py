"""Forward and backward of prefix-grouper beside the plain forward, and beside what its operation count predicts.

    python benchmarks/prefix_grouper.py

writes a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import PAGE, SHARED_PREFIXES, allocations, cpu_seconds, installed, quartiles, with_section  # noqa: E402
from rlplugins_local.policy import Policy, Sequences, packed, token_log_probs  # noqa: E402
from rlplugins_prefix_grouper import PrefixGrouper, cost  # noqa: E402

RATIOS, GROUPS = (1, 4, 16), (4, 8, 16)
RESPONSE = 64
TARGET = 0.8
SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
INTRODUCTION = """Written by `benchmarks/prefix_grouper.py`: forward and backward of one group in one micro-batch, of
a Qwen2 model of {parameters:.1f} M parameters ({layers} layers of {size}, vocabulary {vocabulary:,}) in float32 with
`sdpa`, responses of {response} tokens, on one thread. The plain forward is the local trainer's: causal attention
without a mask, logits of the responses only. Both run by turns, {rounds} times. A saving is 1 - shared / plain. Time
is CPU time: the median of the savings of neighbouring runs, with their first and third quartile. Memory is the peak
of what torch allocates, by its profiler. Predicted for time: floating-point operations, in linear layers per token,
in attention per pair of query and key, in logits per wanted token. Predicted for memory: what the layers hold of the
plain peak, times the share of the tokens that goes; the logits' part stays. The target is {target:.0%} of what is
predicted."""

Pass = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One group: a prompt of `prefix` tokens and `group` responses of `RESPONSE`."""

    prefix: int
    group: int

    @property
    def count(self) -> dict[str, float]:
        """Tokens and pairs, repeated and shared."""
        return cost(self.prefix, [RESPONSE] * self.group)

    def sequences(self) -> Sequences:
        """Random tokens."""
        source = torch.Generator().manual_seed(0)
        prompt = torch.randint(SHAPE["vocab_size"], (self.prefix,), generator=source).tolist()
        responses = torch.randint(SHAPE["vocab_size"], (self.group, RESPONSE), generator=source)
        return Sequences.of([prompt] * self.group, responses, torch.ones_like(responses, dtype=torch.bool))


@dataclass(frozen=True)
class Saving:
    """What was saved of a case, and what the count predicts: 1 - shared / plain."""

    measured: Sequence[float]
    predicted: float

    @property
    def share(self) -> float:
        """Of the prediction."""
        return statistics.median(self.measured) / self.predicted

    def cells(self) -> list[str]:
        """Predicted, measured, share, and whether the target is met."""
        spread = " ({:.1%} to {:.1%})".format(*quartiles(self.measured)) if len(self.measured) > 1 else ""
        verdict = "met" if self.share >= TARGET else "**missed**"
        return [
            f"{self.predicted:.1%}",
            f"{statistics.median(self.measured):.1%}{spread}",
            f"{self.share:.0%}",
            verdict,
        ]


def make_policy() -> Policy:
    """The model, untrained."""
    torch.manual_seed(0)
    return Policy(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)), None, torch.device("cpu"))


def passes(policy: Policy, case: Case) -> tuple[Pass, Pass]:
    """Forward and backward with and without the plugin."""
    sequences, owner = case.sequences(), PrefixGrouper().forward

    def run(forward: Any) -> None:
        policy.owner = forward
        policy.forward(sequences, 1.0).log_probs.sum().backward()
        policy.model.zero_grad(set_to_none=True)

    return lambda: run(owner), lambda: run(None)


def check(policy: Policy, case: Case) -> None:
    """Raise if both do not compute the same."""
    found = []
    for owner in (PrefixGrouper().forward, None):
        policy.owner = owner
        with torch.no_grad():
            found.append(policy.forward(case.sequences(), 1.0).log_probs)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def operations(model: nn.Module, tokens: float, pairs: float, logits: int) -> float:
    """Floating-point operations of a forward; a backward has twice as many."""
    linear = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, nn.Linear))
    attention = SHAPE["num_hidden_layers"] * SHAPE["hidden_size"]
    # scores and their sum take 4 d operations per pair, and the count has every pair twice
    return 2 * tokens * linear + 2 * pairs * attention + 2 * logits * model.lm_head.weight.numel()


def predicted_time(model: nn.Module, case: Case) -> float:
    """Share of the operations that sharing saves."""
    count = case.count
    shared = operations(model, count["tokens_grouped"], count["pairs_grouped"], case.group * RESPONSE)
    plain = operations(model, count["tokens_repeated"], count["pairs_repeated"], case.group * (RESPONSE + 1))
    return 1 - shared / plain


def memory_of_logits(case: Case) -> int:
    """Peak of the loss alone, forward and backward, in bytes."""
    batch = packed(case.sequences(), torch.device("cpu"), False)

    def loss() -> None:
        logits = torch.randn(case.group, RESPONSE, SHAPE["vocab_size"], requires_grad=True)
        token_log_probs(logits, batch, 1.0).log_probs.sum().backward()

    return allocations(loss)[0]


def measure(policy: Policy, case: Case, rounds: int) -> tuple[Saving, Saving]:
    """Savings of time and of memory."""
    check(policy, case)
    shared, plain = passes(policy, case)
    shared(), plain()
    times = [(cpu_seconds(shared), cpu_seconds(plain)) for _ in range(rounds)]
    time = Saving([1 - mine / theirs for mine, theirs in times], predicted_time(policy.model, case))
    mine, theirs = allocations(shared)[0], allocations(plain)[0]
    layers = theirs - memory_of_logits(case)
    saved = layers * (1 - case.count["token_ratio"])
    return time, Saving([1 - mine / theirs], saved / theirs)


def table(found: Sequence[tuple[Case, Saving]], what: str) -> str:
    """One line per case."""
    head = ["prompt / response", "responses", f"{what} saved, predicted", "measured", "share", f"at least {TARGET:.0%}"]
    rows = [[f"{case.prefix // RESPONSE}", f"{case.group}", *saving.cells()] for case, saving in found]
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=SHARED_PREFIXES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--page", type=Path, default=ROOT / PAGE, help="where the section goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = make_policy()
    times, memories = [], []
    for ratio, group in itertools.product(RATIOS, GROUPS):
        case = Case(ratio * RESPONSE, group)
        time, memory = measure(policy, case, options.rounds)
        times.append((case, time))
        memories.append((case, memory))
        print(case, time.cells(), memory.cells(), flush=True)
    introduction = INTRODUCTION.format(
        parameters=sum(part.numel() for part in policy.model.parameters()) / 1e6, layers=SHAPE["num_hidden_layers"],
        size=SHAPE["hidden_size"], vocabulary=SHAPE["vocab_size"], response=RESPONSE, rounds=options.rounds, target=TARGET,
    )  # fmt: skip
    footer = f"Run with torch {installed('torch')}, transformers {installed('transformers')}, beside other work on the machine."
    body = "\n\n".join(
        [
            textwrap.fill(introduction, 120, break_on_hyphens=False),
            table(times, "time"),
            table(memories, "memory"),
            footer,
        ]
    )
    text = options.page.read_text() if options.page.exists() else ""
    options.page.write_text(with_section(text, SHARED_PREFIXES, body))


if __name__ == "__main__":
    main()
