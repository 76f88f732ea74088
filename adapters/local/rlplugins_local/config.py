"""The settings of `rlplugins train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from rlplugins.errors import ConfigurationError
from rlplugins.plan import PREFERENCES, REWARDS

NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(BaseModel):
    """One run of the local trainer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    model: Path
    """Folder of a Hugging Face causal language model with its tokenizer."""
    data: Path | None = None
    """Prompt file: JSONL with a `prompt` per line, and any further fields."""
    reward: str | None = None
    """Reward function, `module:function` or `file.py:function`."""
    pairs: Path | None = None
    """Instead of data and reward: JSONL with `prompt`, `chosen` and `rejected` per line, and any further fields."""
    output: Path = Path("runs/train")
    """Folder for metrics, checkpoints and logs."""
    resume: bool = False
    """Continue from the newest checkpoint in the output folder."""

    steps: PositiveInt = 100
    """Number of steps."""
    batch_size: PositiveInt = 256
    """Responses (of a pairs file: pairs) per step."""
    group_size: PositiveInt | None = None
    """Responses per prompt; by default 8, or what the stack needs."""
    mini_batches: PositiveInt = 1
    """Optimiser steps per pass over the batch, each on whole prompts."""
    epochs: PositiveInt = 1
    """Passes over the batch; with more than one, updates are off-policy."""
    micro_batch_size: PositiveInt | None = None
    """Responses (or pairs) per forward pass; by default as many as fill 16,384 tokens."""
    generation_batch_size: PositiveInt | None = None
    """Rows that are generated at a time; by default all."""

    learning_rate: NonNegative = 1e-5
    """Learning rate of AdamW."""
    weight_decay: NonNegative = 0.0
    """Weight decay of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps over which the learning rate rises from 0."""
    max_grad_norm: Positive = 1.0
    """Longest gradient; longer ones are scaled down."""

    temperature: Positive = 1.0
    """Temperature of drawing, and of every log-prob."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens that together have this probability."""
    max_new_tokens: PositiveInt = 64
    """Longest response, in tokens."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "gae"] = "grpo"
    """How advantages are computed where no plugin decides."""
    loss: Literal["ppo_clip", "gspo", "cispo", "reinforce"] = "ppo_clip"
    """Policy loss where no plugin decides."""
    clip_low: Fraction = 0.2
    """Distance of the lower bound of the ratio from 1."""
    clip_high: NonNegative = 0.2
    """Distance of the upper bound of the ratio from 1."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss of a negative advantage, in units of the advantage (ppo_clip only)."""
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    """Penalty on the distance from the reference policy."""
    kl_coefficient: NonNegative = 0.001
    """Factor on that penalty."""
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """How a loss per token becomes one number; sequence_sum divides by max_new_tokens."""
    entropy_coefficient: float = 0.0
    """Factor on the entropy, which is added to what is maximised."""
    value_learning_rate: NonNegative = 1e-3
    """Learning rate of the value head, where the advantages need one."""

    preference_loss: Literal["dpo", "cdpo", "ipo", "simpo"] = "dpo"
    """Loss on pairs where no plugin decides."""
    beta: Positive | None = None
    """Its factor on the log-ratios; by default 0.1, or 2 for simpo."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """How often a label is wrong (cdpo only)."""
    gamma: NonNegative = 1.0
    """Margin between the two responses (simpo only)."""
    nll_coefficient: NonNegative = 0.0
    """Factor on the negative log-likelihood of the chosen responses, which is added to the loss on pairs."""
    max_length: PositiveInt = 512
    """Longest prompt and response of a pair together, in tokens; longer responses are cut."""

    validation_data: Path | None = None
    """Prompt file for validation, with greedy decoding; or a pairs file."""
    validate_every: NonNegativeInt = 0
    """Steps between validations; 0: after the last step only, or as often as a plugin needs."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: after the last step only. The last two are kept."""
    report_to: list[str] = ["tensorboard"]
    """Trackers of accelerate that also get the metrics (tensorboard, wandb, mlflow, ...), or none."""

    seed: NonNegativeInt = 0
    """Seed of the run."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of the weights."""
    threads: PositiveInt | None = None
    """Threads of torch on the CPU; by default torch decides."""

    @model_validator(mode="after")
    def _one_kind_of_training(self) -> TrainConfig:
        if self.pairs is None and (self.data is None or self.reward is None):
            raise ValueError("give data (a prompt file) and reward, or pairs (a pairs file)")
        foreign = OF_RESPONSES if self.pairs is not None else OF_PAIRS
        fields = type(self).model_fields
        given = [name for name in fields if name in foreign and getattr(self, name) != fields[name].get_default()]
        if given:
            other = "with pairs" if self.pairs is not None else "without pairs"
            raise ValueError(f"{', '.join(given)}: without meaning {other}, leave it out")
        return self

    @property
    def objective(self) -> str:
        """What the run trains on: `preferences` or `rewards`."""
        return PREFERENCES if self.pairs is not None else REWARDS


OF_RESPONSES = frozenset(
    {"data", "reward", "group_size", "generation_batch_size", "top_p", "max_new_tokens", "advantage", "loss", "clip_low",
     "clip_high", "dual_clip", "kl", "kl_coefficient", "reduction", "entropy_coefficient", "value_learning_rate"}
)  # fmt: skip
"""Settings of training on responses that are drawn and scored."""

OF_PAIRS = frozenset({"preference_loss", "beta", "label_smoothing", "gamma", "nll_coefficient", "max_length"})
"""Settings of training on pairs."""


def read_settings(options: Mapping[str, Any], where: str) -> TrainConfig:
    """Validated settings.

    Raises:
        ConfigurationError: naming `where` and every field that is wrong or missing.
    """
    try:
        return TrainConfig.model_validate(options)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(map(str, item["loc"]))
            text = item["msg"].removeprefix("Value error, ")
            got = "" if not name or item["type"] in ("missing", "extra_forbidden") else f", got {item['input']!r}"
            problems.append(f"{name}: {text}{got}" if name else text)
        raise ConfigurationError(f"{where}: {'; '.join(problems)}") from None
