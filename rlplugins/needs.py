"""What a plugin needs that no hook produces, and what a trainer can give."""

from __future__ import annotations

from dataclasses import dataclass, replace

MEANINGS = {
    "column": "a column of the rollouts",
    "group_size": "responses per prompt",
    "together": "rows kept in one micro-batch",
    "mini_batch_log_probs": "log-probs of a whole mini-batch before its first backward",
    "prompts_after_update": "prompts chosen after the previous update",
    "current_entropy": "the current entropy in the update",
    "response_prefix": "forced response prefixes",
    "validation_every_step": "validation after every step",
    "trainable_model": "a small trainable model of the plugin's own",
    "engine": "an engine in the middle of a step and after the update",
    "gradients": "loss gradients before the update",
    "judge": "a judge",
    "one_rank": "one rank only (the result depends on how the batch is cut)",
}


@dataclass(frozen=True)
class Need:
    """One need. Make it with the functions of this module.

    Attributes:
        kind: one of `MEANINGS`.
        value: what exactly (the column's name, the size, `group` or `prompt`).
        required: False if the plugin also works without it.
    """

    kind: str
    value: str = ""
    required: bool = True

    def optional(self) -> Need:
        """The same need, which the plugin can do without."""
        return replace(self, required=False)

    def __str__(self) -> str:
        """As the tables print it."""
        text = {"column": f"column {self.value!r}", "group_size": f"{MEANINGS['group_size']}: {self.value}"}.get(
            self.kind, MEANINGS[self.kind] + (f" (by {self.value})" if self.value else "")
        )
        return text if self.required else f"{text} (optional)"


def column(name: str) -> Need:
    """A column: `entropy`, `ref_log_probs`, `rollout_log_probs`, `values`, `components`, or one of the data."""
    return Need("column", name)


def group_size(*, at_least: int | None = None, exactly: int | None = None) -> Need:
    """How many responses every prompt must have."""
    if (at_least is None) == (exactly is None):
        raise ValueError("give exactly one of at_least and exactly")
    return Need("group_size", f"exactly {exactly}" if exactly is not None else f"{at_least} or more")


def together(by: str) -> Need:
    """All rows of a `group` or of a `prompt` in the same micro-batch."""
    return Need("together", by)


MINI_BATCH_LOG_PROBS = Need("mini_batch_log_probs")
PROMPTS_AFTER_UPDATE = Need("prompts_after_update")
CURRENT_ENTROPY = Need("current_entropy")
RESPONSE_PREFIX = Need("response_prefix")
VALIDATION_EVERY_STEP = Need("validation_every_step")
TRAINABLE_MODEL = Need("trainable_model")
ENGINE = Need("engine")
GRADIENTS = Need("gradients")
JUDGE = Need("judge")
ONE_RANK = Need("one_rank")


def allowed_sizes(need: Need) -> tuple[int, float]:
    """Smallest and largest group size that a `group_size` need admits."""
    words = need.value.split()
    if words[0] == "exactly":
        return int(words[1]), int(words[1])
    return int(words[0]), float("inf")
