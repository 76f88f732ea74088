"""Generation and log-probs are those of the Hugging Face model, whatever the batching."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlplugins.rollouts import Sampling
from rlplugins_local.policy import Policy, Sequences, cut, left_padded, nucleus

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [7, 8], [14]]
EMPTY = [[] for _ in PROMPTS]
KINDS = ["qwen2", "llama", "gpt2"]


def sampling(rows: int = len(PROMPTS), tokens: int = 12, temperature: float = 1.0) -> Sampling:
    return Sampling.of(rows, temperature, tokens)


def plain_log_probs(policy: Policy, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """From a forward pass of one row without padding."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = policy.model(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_that_of_transformers(policy, kind):
    mine = policy(kind)
    drawn = mine.generate(PROMPTS, EMPTY, sampling(), seed=0, greedy=True)
    for row, prompt in enumerate(PROMPTS):
        theirs = mine.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert drawn.responses[row][drawn.mask[row]].tolist() == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_an_unpadded_pass(policy, kind):
    mine = policy(kind)
    drawn = mine.generate(PROMPTS, EMPTY, sampling(temperature=0.7), seed=1)
    sequences = Sequences.of(PROMPTS, drawn.responses, drawn.mask)
    for size in (1, 2, None):
        ours = mine.passes(sequences, 0.7, size).log_probs
        for row, prompt in enumerate(PROMPTS):
            response = drawn.responses[row][drawn.mask[row]].tolist()
            plain = plain_log_probs(mine, prompt, response, 0.7)
            assert torch.allclose(ours[row][drawn.mask[row]], plain, atol=1e-5)
            assert torch.allclose(drawn.log_probs[row][drawn.mask[row]], plain, atol=1e-5)
        assert bool((ours[~drawn.mask] == 0).all())


def test_entropy_is_that_of_the_full_distribution(policy):
    mine = policy()
    drawn = mine.generate(PROMPTS, EMPTY, sampling(), seed=1)
    ours = mine.passes(Sequences.of(PROMPTS, drawn.responses, drawn.mask), 1.0, None, entropy=True).entropy
    row = PROMPTS[0] + drawn.responses[0][drawn.mask[0]].tolist()
    with torch.no_grad():
        logits = mine.model(torch.tensor([row])).logits[0, len(PROMPTS[0]) - 1 : -1]
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(ours[0][drawn.mask[0]], wanted, atol=1e-5)


def test_responses_end_with_the_end_token_or_at_their_own_limit(policy):
    limits = torch.tensor([1, 2, 3, 9, 30])
    drawn = policy().generate(PROMPTS, EMPTY, dataclasses.replace(sampling(), max_tokens=limits), seed=5)
    lengths = drawn.mask.sum(1)
    last = drawn.responses.gather(1, lengths[:, None] - 1)[:, 0]
    assert bool(((lengths == limits) | ((last == 1) & (lengths < limits))).all())
    ends = (drawn.responses == 1) & drawn.mask
    assert bool((ends.sum(1) <= 1).all())
    assert bool((drawn.responses[~drawn.mask] == 0).all())


def test_a_prefix_is_the_beginning_of_the_response_and_continued(policy):
    mine = policy()
    prefixes = [[12, 13], [], [5], [9, 9, 9], []]
    drawn = mine.generate(PROMPTS, prefixes, sampling(), seed=0, greedy=True)
    for row, (prompt, prefix) in enumerate(zip(PROMPTS, prefixes, strict=True)):
        context = torch.tensor([prompt + prefix])
        theirs = mine.model.generate(context, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert drawn.responses[row][drawn.mask[row]].tolist() == theirs[0, len(prompt) :].tolist()
        assert drawn.prefix[row].tolist() == [place < len(prefix) for place in range(drawn.mask.shape[1])]
    assert bool(drawn.mask[drawn.prefix].all())
    assert bool((drawn.log_probs[drawn.prefix] == 0).all())


def test_every_row_has_its_own_temperature(policy):
    mine = policy()
    prompts = [PROMPTS[0]] * 400
    mixed = dataclasses.replace(sampling(400, 1), temperature=torch.tensor([0.0, 0.5] * 200))
    drawn = mine.generate(prompts, [[]] * 400, mixed, seed=2)
    with torch.no_grad():
        logits = mine.model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert set(drawn.responses[::2, 0].tolist()) == {int(logits.argmax())}
    shares = torch.bincount(drawn.responses[1::2, 0], minlength=len(logits)) / 200
    assert float((shares - (logits / 0.5).softmax(-1)).abs().max()) < 0.12
    assert bool((drawn.log_probs[::2] == 0).all())


def test_process_logits_gets_the_numbers_of_the_running_rows(policy):
    seen = []

    def force(logits, numbers):
        seen.append(len(numbers["token"]))
        return logits.scatter(1, numbers["token"][:, None], 1e4)

    numbers = {"token": torch.tensor([5, 1, 7, 8, 9])}
    params = dataclasses.replace(sampling(tokens=3), numbers=numbers)
    drawn = policy().generate(PROMPTS, EMPTY, params, seed=0, process=force)
    assert drawn.responses.tolist() == [[5, 5, 5], [1, 0, 0], [7, 7, 7], [8, 8, 8], [9, 9, 9]]
    assert seen[0] == 5


def test_the_same_seed_draws_the_same_and_another_seed_does_not(policy):
    mine = policy()
    first, again, other = (mine.generate(PROMPTS, EMPTY, sampling(), seed=seed).responses for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_rows_that_are_finished_leave_the_batch_without_changing_the_others(policy):
    mine = policy()
    limits = torch.tensor([1, 1, 1, 1, 12])
    drawn = mine.generate(PROMPTS, EMPTY, dataclasses.replace(sampling(), max_tokens=limits), seed=0, greedy=True)
    alone = mine.generate(PROMPTS[-1:], [[]], sampling(1), seed=0, greedy=True)
    width = alone.responses.shape[1]
    assert drawn.responses[-1, :width].tolist() == alone.responses[0].tolist()


def test_nucleus_keeps_the_fewest_tokens_with_that_probability():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    kept = nucleus(probs, torch.tensor([[0.8], [0.75]]))
    assert torch.allclose(kept[0], torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert torch.allclose(kept[1], torch.tensor([0.0, 2 / 9, 3 / 9, 4 / 9]))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    size=st.none() | st.integers(1, 9),
    units=st.none() | st.integers(1, 5),
)
def test_every_row_is_in_one_pass_and_units_stay_whole(lengths, size, units):
    labels = None if units is None else torch.arange(len(lengths)) % units
    parts = list(cut(torch.tensor(lengths), size, labels))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    if labels is None:
        assert size is None or max(len(part) for part in parts) <= size
        longest = [max(lengths[row] for row in part) for part in parts]
        shortest = [min(lengths[row] for row in part) for part in parts]
        assert all(high <= low for high, low in zip(longest, shortest[1:], strict=False))
    else:
        owners = [set(labels[part].tolist()) for part in parts]
        assert sum(map(len, owners)) == len(set(labels.tolist()))


def test_left_padding_is_zero():
    ids, lengths = left_padded([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert lengths.tolist() == [3, 1]


def test_values_come_from_the_state_that_predicts_the_token(policy):
    mine = policy()
    mine.add_value_head()
    torch.nn.init.normal_(mine.value_head.weight, generator=torch.Generator().manual_seed(0))
    drawn = mine.generate(PROMPTS, EMPTY, sampling(), seed=1)
    ours = mine.passes(Sequences.of(PROMPTS, drawn.responses, drawn.mask), 1.0, 2, values=True)
    row = PROMPTS[2] + drawn.responses[2][drawn.mask[2]].tolist()
    with torch.no_grad():
        hidden = mine.model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1]
        wanted = mine.value_head(hidden[0, len(PROMPTS[2]) - 1 : -1])[:, 0]
    assert torch.allclose(ours.values[2][drawn.mask[2]], wanted, atol=1e-5)
    assert torch.allclose(ours.log_probs, drawn.log_probs, atol=1e-5)
