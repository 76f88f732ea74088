"""Facts about prefix-grouper: first the numbers of the official code, then what must equal the ordinary forward."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rlplugins_prefix_grouper as module
from rlplugins import needs, together
from rlplugins.errors import ConfigurationError, DataError, StackError
from rlplugins.stack import StackConfig
from rlplugins.testing import conformance, credit, make_rollouts, start
from rlplugins_local import arithmetic
from rlplugins_local.adapter import build_stack
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PromptFile, Scorer
from rlplugins_local.policy import Policy, Sequences, packed, token_log_probs
from rlplugins_local.run import LocalTrainer
from rlplugins_prefix_grouper import Layout, PrefixGrouper, Row, cost

test_conformance = conformance("prefix-grouper", [{}, {"min_group": 1}])

CPU = torch.device("cpu")
VOCABULARY = 40


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# the card's worked example: one head, d = 2, P = 3, L = 2, 1, 3

Q = [[0.03, 1.36], [1.22, -0.51], [-0.3, -0.53], [0.57, -0.06], [0.75, -1.85], [1.57, -0.1], [0.68, -0.14], [-0.38, 0.46],
     [0.82, -0.2]]  # fmt: skip
K = [[-0.15, 0.69], [-0.87, -1.51], [0.39, -0.67], [-1.92, -0.81], [-0.47, -1.19], [-1.49, 0.04], [0.9, -0.23], [-0.74, 0.38],
     [0.72, -0.3]]  # fmt: skip
V = [[0.54, 1.04], [-0.21, -0.81], [0.35, 0.25], [1.1, -1.28], [-0.66, -0.84], [-1.73, 0.13], [0.53, -0.74], [1.39, 0.82],
     [0.63, 0.4]]  # fmt: skip
W = [[0.96, -1.33], [0.61, 0.6], [-1.77, 0.35], [-0.25, 0.78], [-0.44, -0.02], [0.34, -0.88], [0.6, -0.1], [0.49, -0.52],
     [1.09, 0.61]]  # fmt: skip
OUTPUT = [[0.54, 1.04], [0.13278252, 0.03553021], [0.097560133, -0.14413228], [0.38324613, 0.0097282146],
          [-0.080195392, -0.55439962], [0.19173175, 0.30436279], [0.35466242, -0.12447476], [0.63140351, 0.30613006],
          [0.51493286, 0.065962864]]  # fmt: skip
DK = [[-0.0031663643, -0.034397907], [-0.014246561, 0.00047227537], [0.053879195, 0.053952358], [-0.090264141, 0.061739201],
      [0.040543122, -0.10000637], [-0.034852161, 0.0022198829], [-0.061133638, 0.035032459], [0.065420487, -0.008324082],
      [0.043820061, -0.01068782]]  # fmt: skip


def plain(q, k, v, layout, scale):
    return module.grouped_attention(functools.partial(module.plain_attention, scale=scale), q, k, v, layout)[0]


KERNELS = {"formula": plain, "kernel": module.FusedAttention.apply}


@pytest.mark.parametrize("attend", KERNELS.values(), ids=KERNELS)
def test_worked_example(attend):
    q, k, v = (torch.tensor(x, dtype=torch.float64)[:, None].requires_grad_() for x in (Q, K, V))
    out = attend(q, k, v, Layout([3], [[2, 1, 3]], [], CPU), 2**-0.5)
    torch.testing.assert_close(out[:, 0], torch.tensor(OUTPUT, dtype=torch.float64), atol=5e-9, rtol=1e-7)
    loss = (out[3:, 0] * torch.tensor(W, dtype=torch.float64)[3:]).sum()
    assert float(loss.detach()) == pytest.approx(0.73245916, abs=5e-9)
    loss.backward()
    torch.testing.assert_close(k.grad[:, 0], torch.tensor(DK, dtype=torch.float64), atol=5e-10, rtol=1e-7)


def test_every_response_restarts_where_its_prompt_ends():
    # the last wanted token is never an input: three, two and four wanted ones
    row = Row.of(batch_of([[5, 6, 7]] * 3, [3, 2, 4]), 2, 0)
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 5]]
    assert row.predict.tolist() == [2, 3, 4, 2, 5, 2, 6, 7, 8]


@pytest.mark.parametrize(
    ("prefix", "responses", "expected"),
    [
        (3, [2, 1, 3], (15, 9, 0.6, 77, 59, 0.76623377)),
        (4096, [512] * 8, (36864, 8192, 0.22222222, 169869312, 52428800, 0.30864198)),
    ],
)
def test_cost_of_a_group(prefix, responses, expected):
    assert tuple(cost(prefix, responses).values()) == pytest.approx(expected, abs=5e-9)


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 8))
def test_the_cost_tends_to_one_of_the_groups_copies(group, length):
    found = cost(10**6, [length] * group)
    assert found["token_ratio"] == pytest.approx(1 / group, rel=1e-3)
    assert found["pair_ratio"] == pytest.approx(1 / group, rel=1e-3)


# attention

groups = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), max_size=3)


@settings(max_examples=40, deadline=None)
@given(groups, st.lists(st.integers(1, 7), max_size=3), st.sampled_from([(1, 1), (2, 2), (6, 2)]), st.integers(0, 99))
@pytest.mark.parametrize("attend", KERNELS.values(), ids=KERNELS)
def test_attention_equals_that_of_the_repeated_prefix(attend, groups, alone, heads, seed):
    prefixes, responses = [size for size, _ in groups], [lengths for _, lengths in groups]
    mask = visible(prefixes, responses, alone)
    if not len(mask):
        return
    layout = Layout(prefixes, responses, alone, CPU)
    source = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(len(mask), n, 4, dtype=torch.float64, generator=source) for n in (heads[0], heads[1], heads[1])
    )
    weight = torch.randn(q.shape, dtype=torch.float64, generator=source)
    found = with_gradients(lambda *x: attend(*x, layout, 0.7), q, k, v, weight=weight)
    expected = with_gradients(lambda *x: repeated(*x, mask, 0.7), q, k, v, weight=weight)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def visible(prefixes, responses, alone):
    """(N, N) which key each query sees: of its own segment and of its prefix, up to itself."""
    sizes = torch.tensor(
        [*prefixes, *(length for lengths in responses for length in lengths), *alone], dtype=torch.int64
    )
    parent = torch.arange(len(sizes))
    owners = [place for place, lengths in enumerate(responses) for _ in lengths]
    parent[len(prefixes) : len(prefixes) + len(owners)] = torch.tensor(owners, dtype=torch.int64)
    own, parent = (x.repeat_interleave(sizes) for x in (torch.arange(len(sizes)), parent))
    return ((own[:, None] == own) | (parent[:, None] == own)).tril()


def repeated(q, k, v, mask, scale):
    """Softmax attention over one mask of the whole row."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def with_gradients(function, *inputs, weight):
    """The output and the gradients of sum(weight * output)."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


SIZES = {
    "one group": ([3], [[2, 1, 3]], []),
    "groups and rows alone": ([4, 2, 5], [[2, 0, 3], [0, 0], [1, 4]], [3, 6]),
    "rows alone": ([], [], [4, 2]),
    "no token of a response": ([3], [[0, 0]], [1]),
}


@pytest.fixture
def varlen_on_the_cpu():
    """The formula in the place of torch's flash attention for GPUs, whose calls are then checked here."""
    library = torch.library.Library("aten", "IMPL")

    def weights(q, k, causal, scale):
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf) if causal else scores

    def sequences(queries, keys, *ends):
        assert [end.dtype for end in ends] == [torch.int32] * 2
        assert [int(end[-1]) for end in ends] == [len(queries), len(keys)]
        return zip(*([slice(*pair) for pair in pairwise(end.tolist())] for end in ends), strict=True)

    def forward(q, k, v, query_ends, key_ends, longest, longest_key, dropout, causal, return_debug_mask, scale=None):
        out, lse, shared = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q)), q.shape[1] // k.shape[1]
        for at, of in sequences(q, k, query_ends, key_ends):
            assert (at.stop - at.start <= longest, of.stop - of.start <= longest_key) == (True, True)
            scores = weights(q[at], k[of], causal, scale)
            lse[:, at] = scores.logsumexp(-1)
            out[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[of].repeat_interleave(shared, 1))
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(grad, q, k, v, out, lse, query_ends, key_ends, longest, longest_key, dropout, causal, *_, scale=None):
        found, shared = [torch.zeros_like(x) for x in (q, k, v)], q.shape[1] // k.shape[1]
        for at, of in sequences(q, k, query_ends, key_ends):
            probs = (weights(q[at], k[of], causal, scale) - lse[:, at, None]).exp()
            change = torch.einsum("qhd,khd->hqk", grad[at], v[of].repeat_interleave(shared, 1))
            change = probs * (change - (grad[at] * out[at]).sum(-1).T[..., None]) * scale
            found[0][at] = torch.einsum("hqk,khd->qhd", change, k[of].repeat_interleave(shared, 1))
            for whole, by, x in ((found[1], change, q), (found[2], probs, grad)):
                whole[of] += torch.einsum("hqk,qhd->khd", by, x[at]).unflatten(1, (-1, shared)).sum(2)
        return tuple(found)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_two_calls_on_rows_of_segments_equal_those_on_padded_batches(varlen_on_the_cpu, sizes):
    tokens = len(visible(*sizes))
    q, k, v, grad = (torch.randn(tokens, n, 4, dtype=torch.float64) for n in (6, 2, 2, 6))
    found = []
    for kernel in (module.PaddedKernel(Layout(*sizes, CPU), 0.3), module.VarlenKernel(Layout(*sizes, CPU), 0.3)):
        out, lse = kernel.forward(q, k, v)
        found.append([out, lse, *kernel.backward(grad, q, k, v, out, lse)])
    for padded, varlen in zip(*found, strict=True):
        torch.testing.assert_close(varlen, padded, atol=1e-12, rtol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_attention_on_a_gpu_equals_that_on_the_cpu(heads):
    sizes = [64, 7], [[5, 0, 33], [16, 1]], [20, 3]
    inputs = [torch.randn(len(visible(*sizes)), n, 64) for n in (heads[0], heads[1], heads[1])]
    weight = torch.randn_like(inputs[0])
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        layout = Layout(*sizes, torch.device(device))
        *moved, factor = (x.to(device, dtype) for x in (*inputs, weight))
        found.append(
            with_gradients(
                lambda *x, layout=layout: module.FusedAttention.apply(*x, layout, 0.125), *moved, weight=factor
            )
        )
    for theirs, mine in zip(*found, strict=True):
        assert float((mine.cpu().float() - theirs).norm() / theirs.norm()) < 0.02


# models

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "initializer_range": 0.25, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
CAPPED = FULL | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {"sliding_window": None}, "Gemma": {}, "Gemma2": CAPPED, "GPTNeoX": {},
    "GPT2": {}, "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 24}, "Phi": {}, "Phi3": {}, "Olmo2": {}, "Cohere": {},
    "Granite": {}, "SmolLM3": {}, "Mixtral": EXPERTS | {"sliding_window": None}, "Qwen3Moe": EXPERTS,
    "DeepseekV3": LATENT | EXPERTS | {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1},
}  # fmt: skip
"""Models of transformers, and what their configurations need beside the shape."""


def model_of(kind, attention="sdpa", **settings):
    """A small untrained model, with distributions far from uniform."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE | MODELS.get(kind, {}) | settings)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch_of(prompts, lengths, entropy=False, gaps=()):
    """Rows with random responses of these lengths; `gaps`: (row, token) that are not wanted."""
    source = torch.Generator().manual_seed(3)
    width = max(1, *lengths)
    responses = torch.randint(2, VOCABULARY, (len(prompts), width), generator=source)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    for place in gaps:
        mask[place] = False
    return packed(Sequences.of(prompts, responses, mask), CPU, entropy)


LONG = [5, 6, 7, 8, 9, 10, 11]
PROMPTS = [LONG, [4], LONG, [12, 13, 14], LONG, [4], [4], LONG, [20, 21, 22, 23]]
"""Four responses to a long prompt, three to a prompt of one token, two prompts alone."""
LENGTHS = [6, 3, 1, 5, 0, 2, 6, 4, 1]
GAPS = [(0, 2), (0, 3), (6, 0), (7, 3)]
"""Tokens of tools: in the middle, at the start, at the end of a response."""


def ordinary(model, batch, temperature):
    """What the local trainer computes where no plugin owns `forward`."""
    tokens = batch.responses.shape[1]
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
                   use_cache=False)  # fmt: skip
    made = token_log_probs(output.logits[:, -tokens - 1 : -1], batch, temperature)
    return made.log_probs, made.entropy


def shared(model, batch, temperature=0.7, **options):
    return PrefixGrouper(**options).forward(model, batch, temperature)


def loss_and_gradients(model, made):
    """Some scalar of log-probs and entropies, and its gradients."""
    log_probs, entropy = made
    source = torch.Generator().manual_seed(5)
    weight = torch.randn(2, *log_probs.shape, generator=source, dtype=log_probs.dtype)
    loss = (log_probs * weight[0]).sum() + (0 if entropy is None else (entropy * weight[1]).sum())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same(model, batch, bound=1e-5, **options):
    """Log-probs, entropies and gradients with and without the plugin."""
    expected = ordinary(model, batch, 0.7)
    theirs = loss_and_gradients(model, expected)
    found = shared(model, batch, **options)
    mine = loss_and_gradients(model, found)
    for first, second in zip(found, expected, strict=True):
        torch.testing.assert_close(first, second, atol=bound, rtol=bound)
    assert set(mine[1]) == set(theirs[1])
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(mine[1][name], gradient, atol=bound * max(1.0, largest), rtol=bound)


EQUAL = [(kind, attention) for kind in MODELS for attention in ("sdpa", "eager")]
EQUAL.remove(("Gemma2", "sdpa"))  # which does not cap the scores


@pytest.mark.parametrize(("kind", "attention"), EQUAL)
def test_log_probs_entropies_and_gradients_equal_the_ordinary_forwards(kind, attention):
    assert_same(model_of(kind, attention), batch_of(PROMPTS, LENGTHS, entropy=True, gaps=GAPS))


def test_values_wider_than_the_queries():
    assert_same(model_of("DeepseekV3", v_head_dim=12), batch_of(PROMPTS, LENGTHS, entropy=True))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([(4,), (5, 6, 7), (5, 6, 8, 9)]), st.integers(0, 4)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 4),
    st.booleans(),
)
def test_any_rows_and_thresholds(rows, min_group, min_prefix, entropy):
    model = model_of("Llama")
    batch = batch_of([list(prompt) for prompt, _ in rows], [length for _, length in rows], entropy=entropy)
    found, expected = shared(model, batch, min_group=min_group, min_prefix=min_prefix), ordinary(model, batch, 0.7)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert (found[1] is None) == (not entropy)
    if entropy:
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_as_trainers_give_them(padded):
    model, batch = model_of("Qwen2"), batch_of(PROMPTS if padded else [LONG] * 9, LENGTHS, entropy=True)
    assert (batch.attention_mask is None) == (not padded)
    attention = batch.attention_mask if padded else torch.ones_like(batch.input_ids)
    attention[:, 7:] = torch.arange(6) < torch.tensor(LENGTHS)[:, None]  # right padding hidden too
    positions = (attention.cumsum(1) - 1).masked_fill(attention == 0, 1)
    other = replace(batch, attention_mask=attention, position_ids=positions, mask=batch.mask.long())
    for first, second in zip(shared(model, other), shared(model, batch), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


def test_the_positions_of_the_batch_are_used():
    model, batch = model_of("Qwen2"), batch_of([LONG] * 3, [3, 4, 2], entropy=True)
    positions = 3 + 2 * torch.arange(11).expand(3, -1)
    assert_same(model, replace(batch, position_ids=positions, attention_mask=torch.ones_like(positions)))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, torch.tensor(0.3)])
def test_the_temperature_divides_the_logits(temperature):
    model, batch = model_of("Llama"), batch_of(PROMPTS, LENGTHS, entropy=True)
    for mine, theirs in zip(shared(model, batch, temperature), ordinary(model, batch, float(temperature)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_a_response_does_not_depend_on_the_others_of_its_group():
    model, batch = model_of("Qwen2"), batch_of([LONG] * 4, [5] * 4)
    before = shared(model, batch)[0]
    batch.responses[2] = batch.input_ids[2, 7:] = torch.tensor([9, 8, 7, 6, 5])
    after = shared(model, batch)[0]
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.allclose(before[2], after[2])


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(9)))
def test_rows_in_another_order_get_the_same_values(order):
    model, batch = model_of("Qwen2"), batch_of(PROMPTS, LENGTHS, entropy=True, gaps=GAPS)
    columns = ("input_ids", "attention_mask", "position_ids", "responses", "mask")
    other = replace(batch, **{name: getattr(batch, name)[list(order)] for name in columns})
    for first, second in zip(shared(model, batch), shared(model, other), strict=True):
        torch.testing.assert_close(first[list(order)], second, atol=1e-5, rtol=1e-5)


def test_without_a_wanted_token_the_model_runs_and_its_gradient_is_zero():
    model, batch = model_of("Qwen2"), batch_of([LONG, LONG, [4]], [0, 0, 0], entropy=True)
    made = shared(model, batch)
    assert not any(bool(part.any()) for part in made)
    _, gradients = loss_and_gradients(model, made)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_a_hidden_token_before_a_wanted_one_is_an_error():
    batch = batch_of([LONG, LONG], [4, 4])
    attention = torch.ones_like(batch.input_ids)
    attention[1, 8] = 0
    with pytest.raises(DataError, match="hides the token before"):
        shared(model_of("Qwen2"), replace(batch, attention_mask=attention))


# what is computed


def sizes(model, batch, **options):
    """Tokens that the layers see, and rows of logits."""
    found = {}
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    hooks = [
        first.register_forward_hook(lambda _, inputs, output: found.update(tokens=output.shape[:2])),
        head.register_forward_hook(lambda _, inputs, output: found.update(logits=output.shape[:2])),
    ]
    shared(model, batch, **options)
    for hook in hooks:
        hook.remove()
    return found["tokens"].numel(), found["logits"].numel()


@pytest.mark.parametrize(
    ("options", "prefixes"),
    [
        ({}, 7 + 1 + 3 + 4),
        ({"min_group": 1}, 7 + 1 + 3 + 4),
        ({"min_group": 3}, 7 + 1 + 3 + 4),
        ({"min_group": 4}, 7 * 3 + 1 * 3 + 3 + 4),  # the empty response does not count
        ({"min_prefix": 1}, 7 + 1 + 3 + 4),
        ({"min_prefix": 2}, 7 + 1 * 3 + 3 + 4),
        ({"min_prefix": 8}, 7 * 3 + 1 * 3 + 3 + 4),
    ],
)
def test_a_prompt_is_computed_once_and_logits_only_where_they_are_wanted(options, prefixes):
    batch = batch_of(PROMPTS, LENGTHS, gaps=GAPS)
    # of each response all but the last wanted token; the last one of row 7 is a tool's
    responses = 5 + 2 + 0 + 4 + 1 + 5 + 2 + 0
    assert sizes(model_of("Qwen2"), batch, **options) == (prefixes + responses, int(batch.mask.sum()))


def kept(function):
    """Bytes that are kept for a backward, parameters aside: what views share counts once."""
    storages = {}

    def pack(x):
        if not isinstance(x, nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made = function()
    found = sum(storage.nbytes() for storage in storages.values())
    del made
    return found


def test_what_a_response_keeps_does_not_depend_on_its_prompt():
    model = model_of("Qwen2", max_position_embeddings=1024)

    def of_one_response(length):
        prompt = [2 + place % 30 for place in range(length)]
        few, many = (kept(lambda n=n: shared(model, batch_of([prompt] * n, [4] * n))) for n in (2, 10))
        return (many - few) / 8

    assert of_one_response(400) == pytest.approx(of_one_response(40), rel=0.02)


# the model's own attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_other_call_of_the_model_stays_as_it_was(attention, tmp_path):
    model, batch = model_of("Qwen2", attention), batch_of(PROMPTS, LENGTHS)
    prompt = torch.tensor([[0, 5, 6], [7, 8, 9]])
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 5, "do_sample": False}
    before = ordinary(model, batch, 1.0)[0], model.generate(prompt, **options)
    shared(model, batch)
    after = ordinary(model, batch, 1.0)[0], model.generate(prompt, **options)
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert model.config._attn_implementation == f"prefix_grouper_{attention}"
    model.save_pretrained(tmp_path)
    assert "prefix_grouper" not in (tmp_path / "config.json").read_text()


def test_an_implementation_that_looks_its_name_up_finds_its_own():
    seen = []

    def flash(layer, *args, **kwargs):
        seen.append(layer.config._attn_implementation)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(layer, *args, **kwargs)

    transformers.AttentionInterface.register("flash_probe", flash)
    model, batch = model_of("Qwen2"), batch_of([LONG] * 4, [5] * 4)
    model.config._attn_implementation = "flash_probe"
    expected = ordinary(model, batch, 0.7)[0]
    torch.testing.assert_close(shared(model, batch)[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ordinary(model, batch, 0.7)[0], expected)
    assert seen == ["flash_probe"] * 4


@pytest.mark.parametrize("given", [True, False])
def test_a_mixture_of_experts_needs_no_balancing_loss(given):
    model, batch = model_of("Mixtral", output_router_logits=given), batch_of(PROMPTS, LENGTHS)
    expected = ordinary(model_of("Mixtral"), batch, 0.7)[0]
    torch.testing.assert_close(shared(model, batch)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_copy_of_the_model_works_too():
    model, batch = model_of("Qwen2"), batch_of(PROMPTS, LENGTHS)
    expected = shared(model, batch)[0]
    reference = copy.deepcopy(model).requires_grad_(False)
    assert torch.equal(shared(reference, batch)[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_gradient_checkpointing(attention, reentrant):
    model = model_of("Llama", attention).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(model, batch_of(PROMPTS, LENGTHS, entropy=True, gaps=GAPS))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_bfloat16_the_error_is_that_of_the_ordinary_forward(attention):
    batch = batch_of(PROMPTS, LENGTHS)
    with torch.no_grad():
        exact = ordinary(model_of("Llama", attention), batch, 1.0)[0]
        model = model_of("Llama", attention).bfloat16()
        theirs, mine = ordinary(model, batch, 1.0)[0], shared(model, batch, 1.0)[0]
    assert mine.dtype == torch.float32
    assert float((mine - exact).norm()) < 2 * float((theirs - exact).norm())


def test_under_autocast_the_attention_runs_in_its_precision():
    model, batch = model_of("Llama"), batch_of(PROMPTS, LENGTHS)
    exact = ordinary(model, batch, 1.0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = ordinary(model, batch, 1.0)[0], shared(model, batch, 1.0)[0]
    loss_and_gradients(model, (mine, None))
    assert 0 < float((mine - exact).detach().norm()) < 2 * float((theirs - exact).detach().norm())


class Wrapper(nn.Module):
    """As trainers wrap models."""

    def __init__(self, inner):
        super().__init__()
        self.module = inner

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_model():
    model, batch = model_of("Qwen2"), batch_of(PROMPTS, LENGTHS)
    expected = ordinary(model, batch, 0.7)[0]
    torch.testing.assert_close(shared(Wrapper(Wrapper(model)), batch)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_sharded_model(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        batch = batch_of(PROMPTS, LENGTHS, entropy=True)
        model = model_of("Qwen2").train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _, expected = loss_and_gradients(model, ordinary(model, batch, 0.7))
        model.zero_grad()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        _, found = loss_and_gradients(model, shared(model, batch))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name].full_tensor(), gradient, atol=1e-4, rtol=1e-5)
    finally:
        distributed.destroy_process_group()


# models that it cannot be used with

STATEFUL = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
REFUSED = {
    "sliding window": ("Mistral", {"sliding_window": 4096}, "sliding window"),
    "sliding layers": ("Gemma2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
    "attention sinks": ("GptOss", EXPERTS | FULL, "s_aux"),
    "convolutions": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
    "Mamba": ("Mamba", {"state_size": 4}, "interface"),
    "attention beside Mamba": ("FalconH1", STATEFUL, "hybrid|state"),
    "ALiBi": ("Bloom", {}, "interface"),
    "arguments that do not reach the attention": ("StableLm", {}, "0 of its 2 layers"),
    "a scale by the place in the row": (
        "Llama4Text",
        FULL | EXPERTS | {"intermediate_size_mlp": 24, "no_rope_layers": [1, 0], "attn_temperature_tuning": True},
        "attn_temperature_tuning",
    ),
    "a rotation by the longest row": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type",
    ),
    "positions of its own": (
        "Bart",
        {"d_model": 16, "decoder_attention_heads": 2, "decoder_layers": 2},
        "position_ids",
    ),
    "no interface": ("XGLM", {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4}, "interface"),
}


@pytest.mark.parametrize(("kind", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_would_give_other_numbers_is_refused(kind, options, reason):
    with pytest.raises(ConfigurationError, match=f"prefix-grouper cannot be used with this model: .*({reason})"):
        shared(model_of(kind, "eager", **options), batch_of(PROMPTS, LENGTHS))


class Strict(transformers.Qwen2ForCausalLM):
    """Takes no further arguments."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)


def test_a_model_that_passes_nothing_on_is_refused():
    with pytest.raises(ConfigurationError, match="passes no further arguments"):
        shared(Strict(model_of("Qwen2").config), batch_of(PROMPTS, LENGTHS))


@pytest.mark.parametrize("change", [{"mixer": nn.Conv1d(1, 1, 3)}, {"mixer": nn.GRU(2, 2)}, {"_is_stateful": True}])
def test_a_state_that_runs_through_the_tokens_is_refused(change):
    model = model_of("Qwen2")
    for name, value in change.items():
        setattr(model, name, value)
    with pytest.raises(ConfigurationError, match="state that runs through the tokens"):
        shared(model, batch_of(PROMPTS, LENGTHS))


def test_a_model_of_more_than_text_is_refused():
    picture = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4,
               "patch_size": 2}  # fmt: skip
    parts = {
        "vision_config": transformers.CLIPVisionConfig(**picture),
        "text_config": transformers.LlamaConfig(**SHAPE),
    }
    config = transformers.LlavaConfig(**parts, image_token_index=3)
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ConfigurationError, match="other things than text"):
        shared(model, batch_of(PROMPTS, LENGTHS))


@pytest.mark.parametrize(
    ("kind", "name"), [("Llama", "attention_dropout"), ("GPTNeoX", "hidden_dropout"), ("OPT", "dropout")]
)
def test_dropout_is_refused_in_training_and_does_not_matter_otherwise(kind, name):
    model, batch = model_of(kind, **{name: 0.1}), batch_of(PROMPTS, LENGTHS)
    torch.testing.assert_close(shared(model, batch)[0], ordinary(model, batch, 0.7)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigurationError, match=r"random numbers in training .*0\.1"):
        shared(model.train(), batch)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 30.0}, "eager"),
        ({"dropout": 0.1}, "dropout of 0.1"),
        ({"mask": torch.zeros(1, 1, 4, 4)}, "mask or a bias of its own"),
        ({"further": {"is_causal": False}}, "not causal"),
        (
            {"further": {"position_bias": torch.zeros(1, 2, 4, 4), "use_cache": False}},
            "unknown to their attention: position_bias",
        ),
    ],
)
def test_a_layer_that_attends_in_another_way_is_refused(change, reason):
    given = {
        "original": "sdpa",
        "mask": None,
        "dropout": 0.0,
        "softcap": None,
        "further": {"position_ids": torch.zeros(1)},
    }
    module.check_call(**given)
    with pytest.raises(ConfigurationError, match=reason):
        module.check_call(**given | change)


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ConfigurationError, match="Linear holds no model of transformers"):
        shared(nn.Linear(2, 2), batch_of(PROMPTS, LENGTHS))


def test_an_attention_implementation_of_somebody_else_is_refused():
    model = model_of("Qwen2")
    transformers.AttentionInterface.register("mine", lambda *args, **kwargs: None)
    model.config._attn_implementation = "mine"
    with pytest.raises(ConfigurationError, match="'mine'"):
        shared(model, batch_of(PROMPTS, LENGTHS))


def test_layers_that_do_not_attend_are_noticed():
    model = model_of("Qwen2")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ConfigurationError, match="1 of its 2 layers"):
        shared(model, batch_of(PROMPTS, LENGTHS))


# the plugin


@pytest.mark.parametrize("options", [{"min_group": 0}, {"min_prefix": -1}, {"padding": "left"}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=rf"prefix-grouper.*{next(iter(options))}"):
        start([{"prefix-grouper": options}])


def test_the_rows_of_a_prompt_stay_together_where_they_can():
    assert PrefixGrouper().needs == (needs.together("prompt").optional(),)
    stack = start(["grpo", "prefix-grouper"])
    rollouts = make_rollouts([0.0, 1.0, 0.0, 1.0], [0, 1, 0, 1])
    units = together.units_of(stack, rollouts, credit(["grpo"], rollouts).groups)
    assert units[0] == units[2] != units[1] == units[3]


def test_another_owner_of_forward_is_refused():
    from rlplugins import Plugin, hookimpl

    class Other(Plugin):
        """Another forward."""

        name = "other"

        @hookimpl
        def forward(self, model, batch, temperature):
            return ordinary(model, batch, temperature)

    with pytest.raises(StackError, match="forward"):
        start(["prefix-grouper", Other()])


# a whole step


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    prompts = ["1+2=", "34+5=", "60+7=", "8="]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    (folder / "rewards.py").write_text("def sevens(prompt, response):\n    return response.count('7') / 8\n")
    return folder


def step_of(task, plugins, **settings):
    """Metrics, gradient and weights of one step of the local trainer."""
    config = TrainConfig(
        model=task / "model", data=task / "prompts.jsonl", reward=f"{task / 'rewards.py'}:sevens", output=task / "out",
        steps=1, batch_size=16, group_size=4, max_new_tokens=6, learning_rate=1e-3, seed=3, report_to=["none"],
        dtype="float64", **settings,
    )  # fmt: skip
    data = PromptFile(config.data)
    stack = build_stack(config, StackConfig(plugins=plugins), data.columns)
    policy = Policy.load(config.model, CPU, torch.float64)
    trainer = LocalTrainer(config, stack, policy, data, None, Scorer(config.reward, list(data.columns)))
    metrics = trainer.step()
    parameters = list(policy.model.parameters())
    return metrics, *(torch.cat([x.flatten() for x in part]) for part in ([x.grad for x in parameters], parameters))


STEPS = {
    "one batch": {},
    "micro-batches": {"micro_batch_size": 3},
    "mini-batches": {"mini_batches": 2, "epochs": 2, "micro_batch_size": 4},
    "critic": {"advantage": "gae"},
    "reference and entropy": {"kl": "k3", "entropy_coefficient": 0.01, "temperature": 0.8},
}


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_step_of_training_is_the_same(task, settings):
    (first, *plain), (second, *mine) = (step_of(task, plugins, **settings) for plugins in ([], ["prefix-grouper"]))
    assert first["grad_norm"] > 0
    for theirs, ours in zip(plain, mine, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=1e-5)
    for name in {"loss", "policy_loss", "grad_norm", "reward", "entropy", "ratio/max", "value_loss"} & set(first):
        assert second[name] == pytest.approx(first[name], abs=1e-5, rel=1e-5)
