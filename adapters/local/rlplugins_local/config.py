"""The settings of `rlplugins train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from rlplugins.errors import ConfigurationError

NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(BaseModel):
    """One run of the local trainer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    model: Path
    """Folder of a Hugging Face causal language model with its tokenizer."""
    data: Path
    """Prompt file: JSONL with a `prompt` per line, and any further fields."""
    reward: str
    """Reward function, `module:function` or `file.py:function`."""
    output: Path = Path("runs/train")
    """Folder for metrics, checkpoints and logs."""
    resume: bool = False
    """Continue from the newest checkpoint in the output folder."""

    steps: PositiveInt = 100
    """Number of steps."""
    batch_size: PositiveInt = 256
    """Responses per step."""
    group_size: PositiveInt | None = None
    """Responses per prompt; by default 8, or what the stack needs."""
    mini_batches: PositiveInt = 1
    """Optimiser steps per pass over the batch, each on whole prompts."""
    epochs: PositiveInt = 1
    """Passes over the batch; with more than one, updates are off-policy."""
    micro_batch_size: PositiveInt | None = None
    """Rows per forward pass; by default as many as fill 16,384 tokens."""
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

    validation_data: Path | None = None
    """Prompt file for validation, with greedy decoding."""
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
            got = "" if item["type"] in ("missing", "extra_forbidden") else f", got {item['input']!r}"
            problems.append(f"{name}: {item['msg']}{got}")
        raise ConfigurationError(f"{where}: {'; '.join(problems)}") from None
