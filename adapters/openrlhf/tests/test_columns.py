"""Between OpenRLHF's layout and the hooks': rows, unequal groups, rows that fill, what travels to the ranks."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch, split_experience_batch

from rlplugins.errors import DataError
from rlplugins.rollouts import Rollouts, completed, concatenate
from rlplugins.table import PromptTable
from rlplugins_openrlhf import columns
from rlplugins_openrlhf.pool import ELSEWHERE, Pool, PoolPrompt, Request
from rlplugins_openrlhf.trainer import recut


def pool(count: int = 4) -> Pool:
    records = [
        {"input": f"{place}=", "category": "odd" if place % 2 else "even", "weight": place} for place in range(count)
    ]
    return Pool([("", record["input"], "", None) for record in records], records, "input", PromptTable())


def sample(place: int, prompt: int, response: int, reward: float | None = 1.0, tool: int = 0) -> Experience:
    """A row of so many tokens; the second to `tool`th of the response are not the policy's own."""
    size = prompt + response
    own = torch.ones(size, dtype=torch.long)
    own[:prompt] = 0
    own[prompt + 1 : prompt + tool] = 0
    given = None if reward is None else torch.tensor([reward])
    info = {"response_clip_ratio": torch.tensor([False]), "length": torch.tensor([float(response)])}
    return Experience(
        sequences=torch.arange(1, size + 1)[None], attention_mask=torch.ones(1, size, dtype=torch.long),
        action_mask=own[None, 1:], prompts=[PoolPrompt.of("x", place, place)], labels=[""], rewards=given, scores=given,
        response_length=torch.tensor([response]), truncated=torch.tensor([False]), total_length=torch.tensor([float(size)]),
        info=info if given is None else info | {"reward": given, "score": given},
    )  # fmt: skip


def rollouts(samples: list[Experience], prompts: int = 4, version: int = 0) -> Rollouts:
    """The rows of these samples."""
    return columns.to_rollouts(samples, pool(prompts).known([sample.prompts[0] for sample in samples]), version)


def test_rows_are_prompts_and_responses_with_the_columns_of_the_file() -> None:
    rows = rollouts([sample(1, 3, 4, 0.5, tool=3), sample(2, 2, 1, 1.0)], version=7)
    assert rows.prompts == [[1, 2, 3], [1, 2]]
    assert rows.responses.tolist() == [[4, 5, 6, 7], [3, 0, 0, 0]]
    assert rows.mask.tolist() == [[True, False, False, True], [True, False, False, False]]
    assert rows.scores.flatten().tolist() == [0.5, 1.0] and rows.version.tolist() == [7, 7]
    assert rows.columns["category"] == ["odd", "even"] and rows.groups.tolist() == [1, 2]
    assert rows.component_names == ("length",) and rows.components.flatten().tolist() == [4.0, 1.0]


@limits(max_examples=20, deadline=None)
@given(
    starts=st.lists(st.integers(1, 6), min_size=1, max_size=5), width=st.integers(1, 5), beyond=st.integers(0, 3),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_what_is_per_token_comes_back_from_whole_sequences(
    starts: list[int], width: int, beyond: int, seed: int
) -> None:
    start = torch.tensor(starts)
    column = torch.rand(len(starts), width, generator=torch.Generator().manual_seed(seed))
    there = columns.to_sequences(column, start, max(starts) - 1 + width + beyond)
    assert torch.equal(columns.to_responses(there, start, width), column)
    assert torch.allclose(there.sum(), column.sum())  # and nothing lies elsewhere


def test_a_reward_that_failed_is_no_finite_reward() -> None:
    rows = [sample(0, 2, 2), sample(0, 2, 2, None)]
    columns.complete(rows)
    assert columns.scores_of(rows).isnan().flatten().tolist() == [False, True]
    assert set(rows[0].info) == set(rows[1].info)
    with pytest.raises(DataError, match="every response"):
        columns.complete([sample(0, 2, 2, None)])


def test_rows_that_plugins_made_are_samples_of_their_own() -> None:
    samples = [sample(0, 3, 4), sample(1, 2, 3)]
    drawn = rollouts(samples)
    same = drawn.select(torch.tensor([1, 0, 0]))
    changed = replace(same, responses=same.responses.clone())
    changed.responses[2, 0] = 99
    made = columns.samples_of(changed, drawn, samples)
    assert made[0] is samples[1] and made[1] is samples[0] and made[2] is not samples[0]
    assert made[2].sequences.tolist() == [[1, 2, 3, 99, 5, 6, 7]]
    assert made[2].action_mask.tolist() == [[0, 0, 1, 1, 1, 1]]


def test_a_row_of_a_prompt_that_the_step_does_not_have_goes_on_as_itself() -> None:
    samples = [sample(0, 3, 4), sample(1, 2, 3)]
    drawn = rollouts(samples)
    foreign = drawn.select(torch.tensor([1]))
    foreign = replace(
        foreign, prompt_keys=torch.tensor([77]), prompt_rows=torch.tensor([-1]), groups=torch.tensor([-1]),
        prompts=[[8, 8, 8, 8]], responses=torch.tensor([[5, 2, 0, 0]]), mask=torch.tensor([[True, True, False, False]]),
        kind=torch.ones(1, dtype=torch.int8), kinds=("policy", "expert"), scores=torch.zeros(1, 1), components=None,
        columns=columns.Columns({columns.ROW: torch.tensor([-1])}),
    )  # fmt: skip
    extended = concatenate([drawn, completed(foreign, drawn)])
    made = columns.samples_of(extended, drawn, samples)
    assert made[0] is samples[0] and made[1] is samples[1]
    assert made[2].prompts[0].position == ELSEWHERE and made[2].prompts[0] == ""
    assert made[2].sequences.tolist() == [[8, 8, 8, 8, 5, 2]] and made[2].action_mask.tolist() == [[0, 0, 0, 1, 1]]
    assert made[2].info["reward"].tolist() == made[2].info["score"].tolist() == made[2].rewards.tolist() == [0.0]
    assert made[2].info["length"].tolist() == [0.0]  # its own component, not that of the row whose layout it took
    assert set(made[2].info) == set(samples[0].info) and samples[0].info["length"].tolist() == [4.0]
    assert extended.groups.tolist() == [0, 1, -1] and extended.kind.tolist() == [0, 0, 1]


def test_no_samples_are_no_rows() -> None:
    rows = rollouts([])
    assert len(rows) == 0 and rows.responses.shape == (0, 1) and rows.groups.dtype == torch.int64


def filled_step(sizes: list[int], multiple: int, micro: int) -> tuple[list[Experience], Any, Any]:
    """Experiences of OpenRLHF's micro-batches with the columns of an update, rows that fill them included."""
    samples = [sample(place, 2 + place % 2, size, float(place)) for place, size in enumerate(sizes)]
    rows = rollouts(samples, len(sizes))
    whole = columns.filled(samples, multiple, 1)
    for place, row in enumerate(whole):
        row.index = [place]
    parts = [Experience.concat_experiences(whole[first : first + micro], 0) for first in range(0, len(whole), micro)]
    given = {"mask": rows.mask, "groups": rows.groups, "rewards": rows.scores, "words": [f"w{row}" for row in range(len(rows))],
             "old_log_probs": torch.rand(rows.mask.shape) * rows.mask}  # fmt: skip
    packing = columns.Packing.of(given)
    starts = torch.tensor([len(prompt) for prompt in rows.prompts])
    for part in parts:
        place = torch.tensor(part.index)
        part.info |= columns.packed(given, packing, place, starts[place.clamp(max=len(starts) - 1)])
    columns.level(parts)
    return parts, given, packing


@limits(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=3, max_size=9), micro=st.integers(1, 4), shuffle=st.randoms())
def test_columns_reach_the_ranks_whatever_way_openrlhf_cuts_the_rows(
    sizes: list[int], micro: int, shuffle: Any
) -> None:
    parts, given, packing = filled_step(sizes, 4, micro)
    parts = pickle.loads(pickle.dumps(parts))
    items = [item for part in parts for item in split_experience_batch(part)]
    shuffle.shuffle(items)
    batches = [make_experience_batch(items[first : first + 2]) for first in range(0, len(items), 2)]
    infos = [columns.taken(batch.info) for batch in batches]
    assert all(not name.startswith(columns.PREFIX) for batch in batches for name in batch.info)
    found = columns.unpacked(infos, packing, "cpu")
    order = [int(word[1:]) for word in found["words"]]
    assert sorted(order) == list(range(len(sizes)))  # each real row once, no other
    for name in ("mask", "groups", "rewards", "old_log_probs"):
        assert torch.equal(found[name], given[name][torch.tensor(order)]), name


def test_rows_that_fill_do_not_move_what_openrlhf_logs() -> None:
    parts, _, _ = filled_step([1, 2, 3], 4, 2)
    rewards = torch.cat([part.info["reward"] for part in parts])
    assert rewards.tolist() == [0.0, 1.0, 2.0, 1.0]  # the last one fills, with the mean
    assert torch.cat([part.response_length for part in parts]).tolist() == [1.0, 2.0, 3.0, 2.0]
    assert parts[1].action_mask[1].sum() == 0


def test_equal_shares_keep_every_row() -> None:
    parts, _, _ = filled_step([1, 2, 3, 4, 5, 1], 2, 4)
    again = recut(parts, 3)
    assert [len(part.sequences) for part in again] == [3, 3]
    assert torch.cat([part.info["reward"] for part in again]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_prompt_keeps_its_place_through_a_pickle() -> None:
    prompt = PoolPrompt.of("text", 5, 2, [Request(0, prefix="a"), Request(1)])
    again = pickle.loads(pickle.dumps(prompt))
    assert again == "text" and (again.position, again.place) == (5, 2) and again.requests[0].prefix == "a"
    sent = again.answered("other", again.requests[1], 3)
    assert sent == "other" and sent.position == 5 and sent.drawn.draw == 1 and sent.prefix == 3
