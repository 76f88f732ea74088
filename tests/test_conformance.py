"""The conformance kit: a plugin that does all as it should passes every check, and each check has one that it finds out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rlplugins.errors import ConfigurationError
from rlplugins.testing import conformance
from rlplugins.testing.conformance import CHECKS

ROOT = Path(__file__).resolve().parent.parent

pytest_plugins = ["pytester"]

MODULE = '''
"""Made for a test (arXiv 2501.00001)."""

from dataclasses import replace
from typing import Any

import torch

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.rollouts import concatenate
from rlplugins.testing import conformance


class Made(Plugin):
    """Does one thing, rightly or wrongly."""

    name = "made"

{body}

test_conformance = conformance(Made{arguments})
'''

SOUND = """
    factor: float = 0.1
    '''How much of everything.'''

    def init_state(self, run):
        run.table.add_column("seen", torch.int32)
        return {"mean": 0.5}

    @hookimpl
    def prompt_weights(self, prompts):
        return 1 + self.table["seen"][prompts.rows].float()

    @hookimpl
    def sampling_params(self, sampling):
        return replace(sampling, temperature=sampling.temperature * (1 + self.state.mean))

    @hookimpl
    def process_logits(self, logits, numbers):
        return logits * self.factor

    @hookimpl
    def extend_rollouts(self, rollouts, engine):
        return rollouts.select(rollouts.version >= 0)

    @hookimpl
    def filter_rollouts(self, scores):
        return (scores.nan_to_num() > 0.1).float()

    @hookimpl
    def prepare_step(self, rollouts, step):
        rollouts["twice"] = 2 * rollouts.scores.nan_to_num()
        step.share("bonus", torch.rand(1, generator=step.generator(self)))

    @hookimpl
    def shape_advantages(self, advantages, entropy, mask, log):
        log("entropy", ops.masked_mean(entropy.float(), mask).mean())
        return advantages - self.state.mean + self.factor * ops.masked_mean(entropy.float(), mask)

    @hookimpl
    def select_tokens(self, mask):
        return (mask.cumsum(1) <= 4).float()

    @hookimpl
    def prepare_mini_batch(self, batch):
        batch.share("weight", batch.sum(batch["mask"].sum()).clamp(min=1))

    @hookimpl
    def clip_range(self, ratio, batch):
        return 0.8, 1.2 + batch.shared["bonus"].to(ratio)

    @hookimpl
    def auxiliary_loss(self, entropy, mask, batch):
        return -(entropy * mask * batch["twice"]).sum() / batch.shared["weight"]

    @hookimpl
    def on_step_end(self, rollouts, scores):
        self.state.mean = float(scores.nanmean()) if len(scores) and bool(scores.isfinite().any()) else 0.5
        self.table["seen"][rollouts.prompt_rows.unique().cpu()] += 1

    @hookimpl
    def on_validation(self, metrics):
        self.state.mean += self.factor * metrics["reward"]
"""

FAULTS = {
    "documentation: an option without meaning": ("documentation", "    factor: float = 1.0"),
    "configuration_errors": ("configuration_errors", "    factor: Any = 1.0\n    '''A number, or is it?'''"),
    "hooks: a shape that only one response has": (
        "hooks",
        """
    @hookimpl
    def shape_advantages(self, advantages):
        return advantages.squeeze().reshape(len(advantages.squeeze()), -1)
""",
    ),
    "hooks: a hook that is never called": (
        "hooks",
        """
    kinds = frozenset({"expert"})

    @hookimpl(kind="expert")
    def policy_loss(self, log_probs):
        return -log_probs
""",
    ),
    "inputs_unchanged": (
        "inputs_unchanged",
        """
    @hookimpl
    def on_step_end(self, scores):
        scores.nan_to_num_()
""",
    ),
    "inputs_unchanged: a column of the update": (
        "inputs_unchanged",
        """
    @hookimpl
    def clip_range(self, batch):
        batch["mask"].logical_and_(batch["mask"])
        return 0.8, 1.2
""",
    ),
    "determinism: a seed of its own": (
        "determinism",
        """
    @hookimpl
    def shape_advantages(self, advantages):
        return advantages * torch.rand(1, generator=torch.Generator().manual_seed(0))
""",
    ),
    "determinism: the generator of another step": (
        "determinism",
        """
    @hookimpl
    def shape_advantages(self, advantages, step):
        return advantages * torch.rand(1, generator=replace(step, number=0).generator(self))
""",
    ),
    "micro_batches": (
        "micro_batches",
        """
    @hookimpl
    def prepare_mini_batch(self, batch):
        batch.share("rows", len(batch))

    @hookimpl
    def adapt_advantages(self, advantages, batch):
        return advantages * (2 if len(batch) < batch.shared["rows"] else 1)
""",
    ),
    "ranks: a sum over one process": (
        "ranks",
        """
    @hookimpl
    def prepare_mini_batch(self, batch):
        batch.share("mean", batch["rewards"].mean())

    @hookimpl
    def adapt_advantages(self, advantages, batch):
        return advantages - batch.shared["mean"]
""",
    ),
    "ranks: state in the update": (
        "ranks",
        """
    def init_state(self, run):
        return {"factor": 2.0}

    @hookimpl
    def adapt_advantages(self, advantages):
        return advantages * self.state.factor
""",
    ),
    "permutation": (
        "permutation",
        """
    @hookimpl
    def shape_advantages(self, advantages):
        return advantages * torch.arange(len(advantages))[:, None]
""",
    ),
    "padding: the width": (
        "padding",
        """
    @hookimpl
    def shape_advantages(self, advantages, mask):
        return advantages * mask.float().mean(1, keepdim=True)
""",
    ),
    "padding: what stands there": (
        "padding",
        """
    @hookimpl
    def shape_advantages(self, advantages, entropy):
        return advantages + entropy.float().sum(1, keepdim=True)
""",
    ),
    "bfloat16": (
        "bfloat16",
        """
    @hookimpl
    def shape_advantages(self, advantages, entropy):
        return advantages + ((entropy + 256) - 256)
""",
    ),
    "state: memory in an attribute": (
        "state",
        """
    @hookimpl
    def shape_advantages(self, advantages):
        return advantages * getattr(self, "factor", 1.0)

    @hookimpl
    def on_step_end(self):
        object.__setattr__(self, "factor", 2.0)
""",
    ),
    "state: what cannot be saved": (
        "state",
        """
    def init_state(self, run):
        return {"seen": {1, 2}}

    @hookimpl
    def prepare_step(self):
        pass
""",
    ),
}

PAIRS = """
    @hookimpl
    def build_preferences(self, pairs):
        pairs["longer"] = (pairs.chosen_mask.sum(1) > pairs.rejected_mask.sum(1)).float()
        return pairs

    @hookimpl
    def preference_loss(self, chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, batch):
        margin = chosen_log_probs.sum(1) - rejected_log_probs.sum(1) - chosen_ref_log_probs.float().sum(1)
        return -torch.nn.functional.logsigmoid(margin) * (1 + batch["longer"])
"""

PAIR_FAULTS = {
    "micro_batches": ("margin = ", "margin = (2 if len(batch) < 9 else 1) * "),
    "permutation": ("margin = ", "margin = torch.arange(len(batch)) + "),
    "padding": (".float().sum(1)", ".float().mean(1)"),
    "bfloat16": (".float().sum(1)", ".add(256).sub(256).float().sum(1)"),
    "inputs_unchanged": ("pairs[", "pairs.chosen.mul_(1); pairs["),
    "determinism": ("margin = ", "margin = torch.rand(1, generator=torch.Generator().manual_seed(0)) * "),
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
GPU_FAULT = """
    @hookimpl
    def shape_advantages(self, advantages):
        return advantages + torch.zeros(advantages.shape)
"""


def outcomes(pytester: pytest.Pytester, body: str, arguments: str = "", module: str = MODULE) -> dict[str, str]:
    """How each check of this plugin ends, by the test's name."""
    pytester.makepyfile(module.format(body=body, arguments=arguments))
    recorded = pytester.inline_run("-p", "no:cacheprovider", "-p", "no:randomly")
    found = zip(("passed", "skipped", "failed"), recorded.listoutcomes(), strict=True)
    return {report.nodeid.partition("test_conformance::")[2]: how for how, reports in found for report in reports}


def test_a_sound_plugin_passes_every_check(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, SOUND)
    expected = {name: "passed" for name in CHECKS}
    assert found == expected | ({} if torch.cuda.is_available() else {"gpu": "skipped"})


@pytest.mark.parametrize(("check", "body"), FAULTS.values(), ids=list(FAULTS))
def test_a_check_finds_its_fault_and_nothing_else_does(pytester: pytest.Pytester, check: str, body: str) -> None:
    found = outcomes(pytester, body)
    assert [name for name, how in found.items() if how == "failed"] == [check]
    assert {name for name, how in found.items() if how == "skipped"} <= {"gpu"}


def test_a_plugin_without_a_source_is_found(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, SOUND, module=MODULE.replace("arXiv 2501.00001", "somewhere"))
    assert [name for name, how in found.items() if how == "failed"] == ["documentation"]


def test_random_numbers_of_other_libraries_are_found(pytester: pytest.Pytester) -> None:
    body = """
    @hookimpl
    def sampling_params(self, sampling):
        import numpy
        return replace(sampling, temperature=sampling.temperature + numpy.random.rand())
"""
    assert outcomes(pytester, body)["determinism"] == "failed"


def test_a_sound_method_of_pairs_passes_every_check(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, PAIRS)
    assert found.keys() == CHECKS.keys()
    assert {name for name, how in found.items() if how != "passed"} <= {"gpu"}


@pytest.mark.parametrize("check", PAIR_FAULTS)
def test_a_check_finds_its_fault_in_a_method_of_pairs(pytester: pytest.Pytester, check: str) -> None:
    found = outcomes(pytester, PAIRS.replace(*PAIR_FAULTS[check]))
    with_it = {"micro_batches": {"ranks"}, "permutation": {"micro_batches", "ranks"}}.get(check, set())
    assert {name for name, how in found.items() if how == "failed"} == {check} | with_it


@needs_gpu
def test_a_tensor_on_the_wrong_device_is_found(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, GPU_FAULT)
    assert [name for name, how in found.items() if how == "failed"] == ["gpu"]


WRONG_SHAPE = """
    @hookimpl
    def shape_advantages(self, advantages):
        return advantages.flatten()
"""


def test_a_plugin_that_cannot_take_a_step_fails_once(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, WRONG_SHAPE)
    assert [name for name, how in found.items() if how == "failed"] == ["hooks"]
    assert {found[name] for name in ("permutation", "padding", "state")} == {"skipped"}


def test_an_argument_that_the_specification_lacks_is_found(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, "    @hookimpl\n    def baseline(self, returns):\n        return returns")
    assert [name for name, how in found.items() if how == "failed"] == ["hooks"]


def test_the_message_says_what_to_do_and_shows_no_inside_of_the_kit(pytester: pytest.Pytester) -> None:
    body = FAULTS["permutation"][1]
    pytester.makepyfile(MODULE.format(body=body, arguments=""))
    result = pytester.runpytest("-k", "permutation")
    result.stdout.fnmatch_lines(["made does not conform, permutation: advantages is * after the rows changed places*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*conformance.py*")


def test_checks_of_hooks_that_a_plugin_lacks_are_not_collected(pytester: pytest.Pytester) -> None:
    found = outcomes(
        pytester, "    @hookimpl\n    def prompt_weights(self, prompts):\n        return prompts.rows + 1.0"
    )
    assert not {"micro_batches", "ranks", "permutation", "padding", "bfloat16"} & set(found)
    assert set(found.values()) <= {"passed", "skipped"}


def test_every_configuration_is_checked_under_its_name(pytester: pytest.Pytester) -> None:
    body = SOUND.replace("advantages - self.state", "advantages * (len(mask) if self.factor > 0.5 else 1) - self.state")
    found = outcomes(pytester, body, ", [{}, {'factor': 1.0}]")
    assert found["padding"] == found["padding[factor=1.0]"] == "passed"
    assert [name for name in found if name.startswith("documentation")] == ["documentation"]


def test_a_method_that_is_defined_by_the_order_of_rows_says_why(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        MODULE.format(body=FAULTS["permutation"][1], arguments=", unless={'permutation': 'row by row'}")
    )
    result = pytester.runpytest("-rs", "-k", "permutation")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*row by row*"])


def test_what_holds_for_every_method_cannot_be_waived() -> None:
    with pytest.raises(ConfigurationError, match="state must hold; only these can differ: permutation, padding"):
        conformance("bnpo", unless={"state": "it forgets"})


def test_rows_give_what_the_kit_does_not_make_up(pytester: pytest.Pytester) -> None:
    body = """
    needs = (needs.column("hints"),)

    @hookimpl
    def shape_advantages(self, advantages, rollouts):
        return advantages + rollouts["hints"]


def with_hints(rollouts):
    rollouts["hints"] = rollouts.responses[:, :1].float()
    return rollouts
"""
    assert outcomes(pytester, body)["hooks"] == "failed"
    assert "failed" not in outcomes(pytester, body, ", rows=with_hints").values()


def test_prompts_have_the_columns_that_the_plugin_reads(pytester: pytest.Pytester) -> None:
    body = """
    needs = (needs.column("level"),)

    @hookimpl
    def prompt_weights(self, prompts):
        return 1 + prompts["level"].float()
"""
    assert outcomes(pytester, body)["hooks"] == "failed"
    given = ', prompts=lambda count: {"level": torch.arange(count)}'
    assert "failed" not in outcomes(pytester, body, given).values()


def test_what_depends_on_the_cut_and_says_so_is_not_cut(pytester: pytest.Pytester) -> None:
    body = "    needs = (needs.ONE_RANK,)\n" + FAULTS["micro_batches"][1]
    found = outcomes(pytester, body)
    assert (found["micro_batches"], found["ranks"]) == ("skipped", "skipped")


def test_pytest_does_not_import_torch_for_tests_of_something_else(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\n\ndef test_it():\n    assert 'rlplugins' not in sys.modules and 'torch' not in sys.modules"
    )
    pytester.runpytest_subprocess("-p", "no:benchmark").assert_outcomes(passed=1)


def test_every_check_is_documented_and_has_a_fault_that_it_finds() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "testing.md").read_text(), flags=re.MULTILINE)
    assert rows == list(CHECKS)
    assert {check for check, _ in FAULTS.values()} | {"gpu"} == set(CHECKS)


def test_the_kit_is_what_the_template_starts_with() -> None:
    template = ROOT / "contrib" / "_template" / "tests" / "test_{name}.py"
    assert 'conformance("{slug}")' in template.read_text()
