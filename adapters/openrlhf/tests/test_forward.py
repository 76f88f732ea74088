"""OpenRLHF's sequences as the rectangle that the hook `forward` takes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor

from rlplugins_openrlhf.columns import to_sequences
from rlplugins_openrlhf.forward import packed

ROWS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=5)


def sequences_of(rows: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, responses with a gap that is not the policy's own, and padding; numbers that name row and place."""
    width = max(prompt + response for prompt, response, _ in rows) + 1
    sequences = torch.zeros(len(rows), width, dtype=torch.int64)
    attention, actions = torch.zeros_like(sequences), torch.zeros(len(rows), width - 1, dtype=torch.int64)
    for row, (prompt, response, gap) in enumerate(rows):
        size = prompt + response
        sequences[row, :size] = 100 * (row + 1) + torch.arange(size)
        attention[row, :size] = 1
        actions[row, prompt - 1 : size - 1] = 1
        actions[row, prompt : min(prompt + gap, size - 2)] = 0
    return sequences, actions, attention


@limits(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_every_response_begins_in_one_column_and_its_values_find_their_way_back(
    rows: list[tuple[int, int, int]],
) -> None:
    sequences, actions, attention = sequences_of(rows)
    batch, starts = packed(sequences, actions, attention, entropy=False)
    left = batch.input_ids.shape[1] - batch.responses.shape[1]
    assert torch.equal(batch.responses, batch.input_ids[:, left:])
    assert left == int(starts.max()) and bool(batch.attention_mask[:, left - 1].all())
    for row, (prompt, response, _) in enumerate(rows):
        size = prompt + response if response else 1  # a row without a wanted token costs one
        there = batch.attention_mask[row].bool()
        assert torch.equal(batch.input_ids[row][there], sequences[row, :size])
        assert batch.position_ids[row][there].tolist() == list(range(size))
        assert not bool(batch.input_ids[row][~there].any())
        wanted = sequences[row, 1:][actions[row].bool()]
        assert torch.equal(batch.responses[row][batch.mask[row]], wanted)
    values = torch.where(batch.mask, batch.responses, 0)
    assert torch.equal(to_sequences(values, starts, actions.shape[1]) * actions, sequences[:, 1:] * actions)
