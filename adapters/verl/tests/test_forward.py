"""verl's jagged micro-batches as the rectangle that the hook `forward` takes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins_verl.columns import stored
from rlplugins_verl.forward import Rectangle

ROWS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=5)


def micro_batch(rows: list[tuple[int, int, int]]) -> dict[str, Tensor]:
    """Prompts and responses with a gap that is not the policy's own, in numbers that name row and place."""
    columns: dict[str, list[Tensor]] = {}
    for row, (prompt, response, gap) in enumerate(rows):
        ids = 100 * (row + 1) + torch.arange(prompt + response)
        mask = torch.ones(response, dtype=torch.int64)
        mask[1 : 1 + gap] = 0
        values = {"input_ids": ids, "prompts": ids[:prompt], "responses": ids[prompt:], "response_mask": mask,
                  "position_ids": torch.arange(len(ids))}  # fmt: skip
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    made = stored(columns, len(rows))
    return {name: made[name] for name in columns}


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_every_response_begins_in_one_column(rows: list[tuple[int, int, int]]) -> None:
    data = micro_batch(rows)
    batch = Rectangle(data).batch(data, entropy=True)
    left = batch.input_ids.shape[1] - batch.responses.shape[1]
    assert left == max(prompt for prompt, _, _ in rows) and batch.entropy
    assert torch.equal(batch.responses, batch.input_ids[:, left:])
    ragged = len({prompt for prompt, _, _ in rows}) > 1
    assert (batch.attention_mask is None) == (batch.position_ids is None) == (not ragged)
    for row, (prompt, response, _) in enumerate(rows):
        whole = data["input_ids"].unbind()[row]
        first = left - prompt
        assert torch.equal(batch.input_ids[row, first : left + response], whole)
        assert not bool(batch.input_ids[row, :first].any()) and not bool(batch.input_ids[row, left + response :].any())
        assert torch.equal(batch.mask[row, :response], data["response_mask"].unbind()[row].bool())
        assert not bool(batch.mask[row, response:].any())
        if batch.attention_mask is not None and batch.position_ids is not None:
            assert batch.attention_mask[row].tolist() == [0] * first + [1] * (len(batch.attention_mask[row]) - first)
            assert batch.position_ids[row, first : left + response].tolist() == list(range(prompt + response))


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_a_tokens_value_is_where_verl_looks_for_it_and_sends_its_gradient_back(
    rows: list[tuple[int, int, int]],
) -> None:
    data = micro_batch(rows)
    rectangle = Rectangle(data)
    values = (torch.arange(len(rows) * rectangle.tokens) + 1.0).view(len(rows), -1).requires_grad_()
    flat = rectangle.jagged(values)
    assert torch.equal(flat.offsets(), data["input_ids"].offsets())
    for row, (prompt, response, _) in enumerate(rows):
        whole = flat.detach().unbind()[row]
        assert torch.equal(whole[prompt - 1 : prompt + response - 1], values[row, :response])
        assert not bool(whole[: prompt - 1].any()) and float(whole[-1]) == 0
    flat.values().sum().backward()
    inside = torch.arange(rectangle.tokens) < torch.tensor([response for _, response, _ in rows])[:, None]
    assert torch.equal(values.grad, inside.float())
