"""Between verl's columns and Rollouts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlplugins.errors import DataError
from rlplugins.rollouts import Columns, Prompts, Requests, Rollouts, completed, concatenate
from rlplugins.steps import Metrics
from rlplugins.table import PromptTable
from rlplugins.testing import make_rollouts
from rlplugins_verl import columns as rows_of_verl
from rlplugins_verl import engine, rows
from rlplugins_verl.columns import KEY, origin_of
from rlplugins_verl.pool import Pool
from rlplugins_verl.worker import decoded, encoded


def stored_rows(sizes: list[int], **further: Any) -> Any:
    """Generated rows as TransferQueue gives them."""
    count = len(sizes)
    responses = [torch.arange(1, size + 1) for size in sizes]
    fields = {
        "prompts": [torch.tensor([7, 8])] * count, "responses": responses,
        "input_ids": [torch.cat([torch.tensor([7, 8]), row]) for row in responses],
        "response_mask": [torch.ones(size, dtype=torch.int64) for size in sizes],
        "rm_scores": [torch.cat([torch.zeros(size - 1), torch.tensor([0.25])]) for size in sizes],
        "rollout_log_probs": [torch.full((size,), -1.0) for size in sizes],
        "uid": [f"u.{row // 2}.{row // 2}" for row in range(count)], "extra_fields": [{} for _ in sizes],
    }  # fmt: skip
    return rows_of_verl.stored(fields | further, count)


def pool(count: int = 3) -> Pool:
    dataset = [
        {"raw_prompt": [{"role": "user", "content": f"{row}?"}], "extra_info": {"level": row}, "data_source": "x"}
        for row in range(count)
    ]
    return Pool.of(dataset, PromptTable())


def test_stored_rows_become_rollouts() -> None:
    extra = [
        {"reward_extra_info": {"score": 1.0, "acc": np.float64(0.5), "note": "x"}, "min_global_steps": 4},
        {"rlplugins__prefix": 1, "rlplugins__columns": {"hint": 3}},
        {"reward_extra_info": {"acc": 1}},
        {},
    ]
    there = stored_rows([3, 1, 2, 2], extra_fields=extra)
    found = rows_of_verl.to_rollouts(
        there, ["u.0.0_0_0", "u.0.0_1_0", "u.1.1_0_0", "u.1.1_1_0"], pool().prompts, 2, keep_log_probs=True
    )
    assert found.mask.sum(1).tolist() == [3, 1, 2, 2]
    assert bool((found.responses[~found.mask] == 0).all()) and bool((found.rollout_log_probs[~found.mask] == 0).all())
    assert found.groups.tolist() == [0, 0, 1, 1]
    assert found.prompt_keys.tolist() == pool().prompts.keys[[0, 0, 1, 1]].tolist()
    assert found.scores.flatten().tolist() == [0.25] * 4
    assert found.component_names == ("acc",) and found.components[[0, 2], 0].tolist() == [0.5, 1.0]
    assert found.components[1, 0].isnan()
    assert found.version.tolist() == [4, 2, 2, 2]
    assert found.prefix.tolist()[1] == [True, False, False] and int(found.prefix.sum()) == 1
    assert found["level"].tolist() == [0, 0, 1, 1] and found["data_source"] == ["x"] * 4  # of the prompts
    assert found["hint"] == [None, 3, None, None] and "hint" in found.columns.written


def test_rows_that_nothing_has_scored_yet_have_no_score() -> None:
    there = stored_rows([1, 2])
    del there["rm_scores"]
    found = rows_of_verl.to_rollouts(there, ["u.0.0_0_0", "u.0.0_1_0"], pool().prompts, 0)
    assert found.scores.shape == (2, 1) and bool(found.scores.isnan().all())


def test_rows_of_a_prompt_that_the_pool_has_not_bring_their_columns() -> None:
    info = [{"level": row + 5} for row in range(2)]
    there = stored_rows([1, 1], extra_info=info, data_source=["y", "z"])
    found = rows_of_verl.to_rollouts(there, ["u.0.1_0_0", "u.1.-1_0_0"], pool().prompts, 0)
    assert found["level"].tolist() == [5, 6] and found["data_source"] == ["y", "z"]
    assert found.prompt_rows.tolist() == [1, -1] and found.prompt_keys.tolist() == [int(pool().prompts.keys[1]), 0]


def test_rows_are_in_the_order_of_prompt_and_draw_whatever_order_they_finished_in() -> None:
    first, last = rows_of_verl.uid_of(9, 40), rows_of_verl.uid_of(10, -1)
    keys = [f"{last}_10_0", f"{first}_1_0", f"{last}_2_0", f"{first}_0_0"]
    assert rows_of_verl.in_order(keys) == [f"{first}_0_0", f"{first}_1_0", f"{last}_2_0", f"{last}_10_0"]
    assert [origin_of(key) for key in keys[:2]] == [(10, -1), (9, 40)]
    assert rows_of_verl.uid_of(9, 40) != first
    with pytest.raises(DataError, match="several outputs"):
        rows_of_verl.in_order([f"{first}_0_0", f"{first}_0_1"])


@pytest.mark.parametrize("sent_by_verl", [False, True])
def test_columns_of_the_update_come_back_as_they_were(sent_by_verl: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 2, 0, 3])[:, None]
    columns = {
        "mask": mask, "advantages": torch.randn(4, 1, generator=generator), "groups": torch.tensor([0, 0, -1, 1]),
        "token_weights": torch.rand(4, 5, generator=generator) * mask, "kind": torch.zeros(4, dtype=torch.int8),
        "rewards": torch.tensor([[1.0, torch.nan, 2.0, 0.0, 0.0]] * 4), "note": ["a", "b", "c", "d"],
        "segments": torch.where(mask, 1, 0), "wide": torch.randn(4, 3, generator=generator),
        "prompt_keys": torch.tensor([2**63 - 1, -(2**63), 2**53 + 1, 0]), "flag": torch.tensor([True, False, True, True]),
        "exact": torch.tensor([0.1, -0.0, torch.inf, 1e-320], dtype=torch.float64),
        "half": torch.tensor([[0.1], [-3.0], [0.0], [7e4]], dtype=torch.bfloat16),
        "old_log_probs": torch.randn(4, 5, generator=generator) * mask,
    }  # fmt: skip
    lengths = [5, 4, 3, 3]  # verl's own columns are as long as the responses, and hold something at every token
    of_verl = {
        "response_mask": [row[:size].long() for row, size in zip(mask, lengths, strict=True)],
        "old_log_probs": [
            torch.where(own, row, 9.0)[:size]
            for own, row, size in zip(mask, columns["old_log_probs"], lengths, strict=True)
        ],
    }
    packed, packing = rows_of_verl.pack(columns, rows_of_verl.OF_UPDATE if sent_by_verl else None)
    sent = {name for name in packed if torch.is_tensor(packed[name][0])}
    twice = set() if sent_by_verl else {"rlplugins__mask", "rlplugins__old_log_probs"}
    assert sent == {"rlplugins__token_weights", "rlplugins__segments", rows_of_verl.NUMBERS} | twice
    there = rows_of_verl.stored({**packed, **of_verl}, 4)
    wanted = torch.tensor([0, 1, 3])
    found = rows_of_verl.unpack(there, packing, wanted, "cpu")
    for name, column in columns.items():
        if isinstance(column, torch.Tensor):
            assert found[name].dtype == column.dtype and found[name].shape[1:] == column.shape[1:], name
            assert torch.equal(found[name].nan_to_num(-7), column[wanted].nan_to_num(-7)), name
    assert found["note"] == ["a", "b", "d"]


def test_rows_that_a_run_without_a_stack_had_sent_are_of_no_prompt_of_the_pool() -> None:
    keys = ["5e-b_1_0", f"{rows_of_verl.uid_of(0, 1)}_0_0", "5e-a_0_0", "5e-b_0_0"]
    assert rows_of_verl.in_order(keys) == ["5e-a_0_0", "5e-b_0_0", "5e-b_1_0", keys[1]]
    found = rows_of_verl.to_rollouts(stored_rows([1, 1, 1]), rows_of_verl.in_order(keys)[:3], pool().prompts, 0)
    assert found.prompt_rows.tolist() == [-1] * 3 and found.groups.tolist() == [0, 1, 1]


def test_columns_of_one_token_keep_their_shape() -> None:
    mask = torch.ones((2, 1), dtype=torch.bool)
    packed, packing = rows_of_verl.pack({"mask": mask, "advantages": torch.tensor([[1.0], [2.0]])})
    found = rows_of_verl.unpack(rows_of_verl.stored(packed, 2), packing, torch.arange(2), "cpu")
    assert found["mask"].shape == (2, 1) and found["advantages"].tolist() == [[1.0], [2.0]]


def test_a_prompt_keeps_its_key_whatever_batch_it_is_in() -> None:
    known = pool()
    batch = {"raw_prompt": [[{"role": "user", "content": text}] for text in ("2?", "0?", "9?")]}
    assert known.positions(batch) == [2, 0, -1]
    by_id = Pool.of([{"raw_prompt": "a", "id": "x"}, {"raw_prompt": "b", "id": "y"}], PromptTable())
    assert by_id.positions({"raw_prompt": ["rewritten"], "id": ["y"]}) == [1]


def test_metrics_are_weighted_means_over_everything() -> None:
    first, second = Metrics(), Metrics()
    first.log("rlplugins/x/max_ratio", 2.0, 3.0)
    second.log("rlplugins/x/max_ratio", 6.0, 1.0)
    parts = [encoded(first), encoded(second)]
    mean = {f"actor/{name}": np.mean([part[name][0] for part in parts]) for name in parts[0]}
    assert not any(word in name.partition("/")[2] for name in mean for word in ("max", "min"))
    assert decoded({**mean, "actor/lr": 1.0}, "actor/") == {"rlplugins/x/max_ratio": 3.0, "actor/lr": 1.0}


class Store:
    """Stands for TransferQueue."""

    def __init__(self) -> None:
        self.put: dict[str, Any] = {}

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any, tags: list[dict]) -> None:
        self.put = {"keys": keys, "fields": fields, "tags": tags}


class Batch:
    """Stands for verl's batch."""

    def __init__(self, keys: list[str], tags: list[dict], partition_id: str, fields: Any, extra_info: Any) -> None:
        self.keys, self.tags, self.partition_id, self.fields, self.extra_info = (
            keys,
            tags,
            partition_id,
            fields,
            extra_info,
        )


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(rows, "tq", made)
    return made


def step_rows() -> tuple[Any, Any, Rollouts]:
    keys = ["u.0.0_0_0", "u.0.0_1_0", "u.1.1_0_0", "u.1.1_1_0"]
    there = stored_rows([3, 1, 2, 2])
    drawn = rows_of_verl.to_rollouts(there, keys, pool().prompts, 2)
    return Batch(keys, [{"seq_len": 1, "global_steps": 5} for _ in keys], "train", None, {}), there, drawn


def test_rows_that_plugins_leave_alone_are_not_written_again(store: Store) -> None:
    batch, there, drawn = step_rows()
    same, kept = rows.added_rows(batch, there, drawn, drawn.select(torch.tensor([3, 0])))
    assert store.put == {} and same is batch
    assert kept.columns[KEY] == ["u.1.1_1_0", "u.0.0_0_0"]


def test_rows_that_plugins_add_or_change_are_stored_under_keys_of_their_own(store: Store) -> None:
    batch, there, drawn = step_rows()
    extended = drawn.select(torch.tensor([0, 0, 2, 3]))
    extended.responses[2, 0] = 99  # changed; and row 1 is a copy
    made, named = rows.added_rows(batch, there, drawn, extended)
    keys = list(named.columns[KEY])
    assert keys[0] == "u.0.0_0_0" and keys[3] == "u.1.1_1_0"
    assert keys[1].startswith("u.0.0_") and keys[2].startswith("u.1.1_") and not {keys[1], keys[2]} & set(batch.keys)
    assert made.keys == [*batch.keys, keys[1], keys[2]]
    assert store.put["keys"] == [keys[1], keys[2]]
    assert [tag["response_len"] for tag in store.put["tags"]] == [3, 2] and store.put["tags"][0]["global_steps"] == 5
    fields = store.put["fields"]
    assert fields["responses"].unbind()[1].tolist() == [99, 2]
    assert fields["input_ids"].unbind()[1].tolist() == [7, 8, 99, 2]
    assert fields["rm_scores"].unbind()[1].tolist() == [0.0, 0.25]
    assert rows_of_verl.as_list(fields["uid"]) == ["u.0.0", "u.1.1"]


def test_a_row_whose_score_alone_was_changed_keeps_what_the_engine_drew_it_with(store: Store) -> None:
    batch, there, drawn = step_rows()
    extended = replace(drawn.select(torch.tensor([0, 1, 2])), scores=torch.tensor([[0.5], [0.25], [0.75]]))
    extended.responses[2, 0] = 99
    _, named = rows.added_rows(batch, there, drawn, extended)
    assert named.columns[KEY][1] == "u.0.0_1_0" and len(store.put["keys"]) == 2
    kept, other = store.put["fields"]["rollout_log_probs"].unbind()
    assert kept.tolist() == [-1.0] * 3 and other.tolist() == [0.0] * 2


def outside(rollouts: Rollouts, rows: int) -> Rollouts:
    """Rows of kind `expert` and no group, to prompts that are not of the pool."""
    made = rollouts.select(torch.zeros(rows, dtype=torch.int64)).unguarded()
    none = torch.full((rows,), -1)
    columns = Columns({KEY: [""] * rows})
    return replace(
        made, prompt_rows=none, prompt_keys=torch.arange(rows) + 7, groups=none, prompts=[[9]] * rows, columns=columns,
        kinds=("policy", "expert"), kind=torch.ones(rows, dtype=torch.int8), scores=torch.zeros(rows, 1),
    )  # fmt: skip


def test_rows_of_prompts_that_the_step_has_not_are_alone_in_verls_store(store: Store) -> None:
    batch, there, drawn = step_rows()
    images = [{"pixels": 1}, {}, {}, {}]
    there["multi_modal_inputs"] = rows_of_verl.stored({"x": images}, 4)["x"]
    extended = concatenate([drawn, completed(outside(drawn, 2), drawn)])
    made, named = rows.added_rows(batch, there, drawn, extended)
    keys = store.put["keys"]
    assert list(named.columns[KEY]) == [*batch.keys, *keys] == list(made.keys)
    fields = store.put["fields"]
    uids = rows_of_verl.as_list(fields["uid"])
    assert len({*uids, "u.0.0", "u.1.1"}) == 4 and [key.rsplit("_", 2)[0] for key in keys] == uids
    assert rows_of_verl.as_list(fields["multi_modal_inputs"]) == [{}, {}]
    assert [row.tolist() for row in fields["prompts"].unbind()] == [[9], [9]]
    assert named.of_kind("expert").tolist() == [False] * 4 + [True] * 2 and named.groups[4:].tolist() == [-1, -1]


def test_rows_of_a_group_are_in_verls_group_and_those_of_a_new_one_in_one_of_their_own(store: Store) -> None:
    batch, there, drawn = step_rows()
    more = drawn.select(torch.tensor([3, 3, 1, 1, 1]))
    more.columns[KEY] = [""] * 5
    more = replace(more, groups=torch.tensor([1, 0, 5, 5, -1]))
    _, named = rows.added_rows(batch, there, drawn, concatenate([drawn, more]))
    uids = [key.rsplit("_", 2)[0] for key in named.columns[KEY][4:]]
    assert uids[:2] == ["u.1.1", "u.0.0"] and uids[2] == uids[3] and len({*uids[2:], "u.0.0", "u.1.1"}) == 4


def test_answers_to_prompts_outside_of_the_pool_have_no_column_of_the_row_that_stood_for_them() -> None:
    known, count = pool(), 2
    there = stored_rows(
        [2, 1], extra_info=[{"level": 0}] * 2, extra_fields=[{"rlplugins__columns": {"hint": row}} for row in range(2)],
    )  # fmt: skip
    made = rows_of_verl.to_rollouts(there, ["u.0.-1_0_0", "u.1.-1_0_0"], known.prompts, 2)
    keys, none = torch.tensor([11, 12]), torch.full((count,), -1)
    prompts = Prompts(keys, none, PromptTable(), ["a", "b"], Columns({"source": ["x", "y"]}))
    asked = Requests.of(prompts, torch.tensor([1, 1]))
    found = engine.as_asked(made, replace(asked, prompt=torch.tensor([1, 0])), score=False)
    assert found.prompt_keys.tolist() == [12, 11] and found.prompt_rows.tolist() == [-1, -1]
    assert found.groups.tolist() == [1, 0] and bool(found.scores.isnan().all())
    assert set(found.columns) == {"hint", "source", KEY} and found.columns["source"] == ["y", "x"]
    assert found.columns.written == {"hint"} and found.columns[KEY] == ["", ""]
    of_pool = Requests.of(known.prompts.select(torch.tensor([2, 1])), torch.tensor([1, 1]))
    found = engine.as_asked(made, of_pool, score=True)
    assert found.prompt_keys.tolist() == known.prompts.keys[[2, 1]].tolist() and "level" in found.columns
    assert found.scores.flatten().tolist() == [0.25, 0.25]


def test_no_rows_can_be_added_to_some() -> None:
    _, _, drawn = step_rows()
    assert len(concatenate([drawn, completed(rows_of_verl.no_rows(), drawn)])) == 4


def test_padding_rows_are_zero_in_every_column() -> None:
    made = make_rollouts([1.0, 0.0], lengths=[2, 3])
    packed, _ = rows_of_verl.pack({"mask": made.mask, "note": ["a", "b"]})
    filler = rows_of_verl.filler(packed["rlplugins__mask"])
    assert filler.tolist() == [False]  # as long as the response that verl gives such a row
    assert rows_of_verl.filler(packed["rlplugins__note"]) == "a"
    numbers = [*packed[rows_of_verl.NUMBERS], rows_of_verl.filler(packed[rows_of_verl.NUMBERS])]
    there = rows_of_verl.stored({rows_of_verl.NUMBERS: numbers}, 3)
    assert rows_of_verl.real_rows(there).tolist() == [True, True, False]
