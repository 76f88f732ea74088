"""The prompt file as the pool of prompts, and the prompts that OpenRLHF hands around, each with its place in it.

OpenRLHF's data set keeps the text, the label, the images and the source of a prompt and drops all else; the adapter reads the
file again and takes the columns from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlplugins.rollouts import Columns, Prompts, as_column, prompt_key
from rlplugins.table import PromptTable

POSITION = "_openrlhf_position"
"""Column of the pool: position of the prompt in OpenRLHF's data set."""
ELSEWHERE = -1
"""The position of a prompt that is not of the data set."""


@dataclass
class Request:
    """What hooks made of one request; what is left out is as OpenRLHF's own.

    Attributes:
        draw: its number among those of the prompt.
        text: the prompt as it is sent.
        prefix: forced beginning of the response, as text or as token ids.
        sampling: by name of vLLM's parameter.
        columns: that hooks wrote.
        answer: token ids of a response that something else has written.
    """

    draw: int = 0
    text: str | None = None
    prefix: str | Sequence[int] = ""
    sampling: Mapping[str, Any] | None = None
    columns: Mapping[str, Any] | None = None
    answer: Sequence[int] | None = None


class PoolPrompt(str):
    """A prompt's text, as OpenRLHF hands it around, with where it comes from and what is to be made of it.

    Attributes:
        position: in the data set; `ELSEWHERE`: it is not of it.
        place: among the prompts of the step.
        requests: one per response, where a hook has a say in them.
        drawn: the request that the response to it came from.
        prefix: tokens of the forced beginning of that response.
    """

    position: int
    place: int
    requests: tuple[Request, ...]
    drawn: Request | None
    prefix: int

    @classmethod
    def of(cls, text: str, position: int, place: int = 0, requests: Sequence[Request] = ()) -> PoolPrompt:
        """The text at a position of the data set."""
        made = cls(text)
        made.position, made.place, made.requests, made.drawn, made.prefix = position, place, tuple(requests), None, 0
        return made

    def answered(self, text: str, request: Request | None, prefix: int) -> PoolPrompt:
        """The prompt as it was sent for one response."""
        made = PoolPrompt.of(text, self.position, self.place)
        made.drawn, made.prefix = request, prefix
        return made


class Pool:
    """The prompts of a run.

    Args:
        dataset: OpenRLHF's data set of prompts.
        records: the rows of the prompt file behind it, in the same order.
        input_key: the row's field that holds the prompt.
        table: the run's prompt table.

    Attributes:
        dataset: the same.
        prompts: all of them, with every column of the file.
    """

    def __init__(self, dataset: Any, records: Sequence[Mapping[str, Any]], input_key: str, table: PromptTable) -> None:
        self.dataset = dataset
        texts = [record[input_key] for record in records]
        keys = keys_of([record.get("id") for record in records], texts)
        names = dict.fromkeys(name for record in records for name in record if name != input_key)
        columns: dict[str, Any] = {name: as_column([record.get(name) for record in records]) for name in names}
        columns[POSITION] = torch.arange(len(keys))
        self.prompts = Prompts(keys, table.resolve(keys), table, texts, Columns(columns))

    @classmethod
    def of(cls, dataset: Any, strategy: Any, table: PromptTable) -> Pool:
        """The pool behind a data set that OpenRLHF has made with these flags."""
        from openrlhf.datasets.utils import blending_datasets

        args = strategy.args.data
        rows = blending_datasets(
            args.prompt_dataset, args.prompt_probs, strategy, strategy.args.train.seed, max_count=args.max_samples,
            dataset_split=args.prompt_split,
        )  # fmt: skip
        records = list(rows.select(range(len(dataset))))
        return cls(dataset, records, args.input_key, table)

    def tag(self) -> None:
        """Let OpenRLHF's data set give prompts that know their place."""
        self.dataset.prompts = [PoolPrompt.of(text, place) for place, text in enumerate(self.dataset.prompts)]

    def known(self, prompts: Sequence[PoolPrompt]) -> Prompts:
        """These prompts, with the columns of the file."""
        return self.prompts.select(torch.tensor([prompt.position for prompt in prompts], dtype=torch.int64))

    def item(self, position: int) -> tuple[str, Any, Any]:
        """Text, label and images of one prompt, as OpenRLHF's loader gives them."""
        _, text, label, images = self.dataset[position]
        return text, label, images


def keys_of(ids: Sequence[Any], texts: Sequence[Any]) -> Tensor:
    """(P,) int64, of the user's id, else of the prompt before any rewriting."""
    names = [str(name) if name is not None else json.dumps(text) for name, text in zip(ids, texts, strict=True)]
    return torch.tensor([prompt_key(name) for name in names], dtype=torch.int64)
