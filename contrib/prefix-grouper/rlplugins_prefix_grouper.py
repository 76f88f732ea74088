"""Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward (arXiv 2506.05433).

Order, positions, the split of the attention and the rule of the last prefix token as in the official code,
johncaged/PrefixGrouper, `src/prefix_grouper/{info,function,forward}.py`; the counting of `cost` from the report, appendix A.2.

The tokens of a micro-batch stand in one row without padding: the prompts that several responses share (each once), these
responses, and the rows that share nothing,

    [prefix_1 ... prefix_n | responses of 1 | ... | responses of n | rows alone]

Everything but the attention treats tokens one by one. In the attention every segment of the row is causal, and a response
also attends to its prefix. The two parts have one softmax between them, which their log-sum-exps give (`merged`), so that
the keys of a prompt are neither repeated nor masked.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn

from rlplugins import Plugin, hookimpl, needs
from rlplugins.errors import ConfigurationError, DataError
from rlplugins.packed import Packed

ARGUMENT = "prefix_groups"
"""The keyword argument through which a model's forward hands the `Layout` down to its attention."""
NAME = "prefix_grouper_"
"""Before the name of the attention implementation that a model had: what it has from its first forward on."""

Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""From queries (B, H, S, d), keys and values (B, H_kv, K, d), and whether query i sees keys 0..i only, to the output
(B, H, S, d) and the log-sum-exp of the scores (B, H, S)."""


class PrefixGrouper(Plugin):
    """Computes a prompt once for all of its responses in a micro-batch: the same log-probs and gradients for less.

    Prefix Grouper (arXiv 2506.05433), for every pass: the update, the old log-probs and the reference's.
    """

    name = "prefix-grouper"
    needs = (needs.together("prompt").optional(),)

    min_group: Annotated[int, Field(ge=1)] = 2
    """Responses in the micro-batch from which on they share their prompt; fewer are computed row by row."""
    min_prefix: Annotated[int, Field(ge=0)] = 0
    """Tokens of a prompt from which on it is shared; responses to a shorter one are computed row by row."""

    @hookimpl
    def forward(self, model: Any, batch: Packed, temperature: float) -> tuple[Tensor, Tensor | None]:
        row = Row.of(batch, self.min_group, self.min_prefix)
        logits = logits_of(model, row)
        if temperature != 1:
            logits = logits / temperature
        log_probs, entropy = token_log_probs(logits, row.labels, bool(batch.entropy))
        return row.unpacked(log_probs), None if entropy is None else row.unpacked(entropy)


def token_log_probs(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs (M,) of tokens `labels` (M,), and the entropies (M,) if wanted, from the logits (M, V) that predict them."""
    normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(-1, labels[:, None])[:, 0] - normaliser
    if not entropy:
        return log_probs, None
    probs = (logits - normaliser[:, None]).exp()
    return log_probs, normaliser - (probs * logits).sum(-1)


def cost(prefix: int, responses: Sequence[int]) -> dict[str, float]:
    """What a group costs with its prefix repeated and shared, in the report's counting.

    `tokens_*` is what the layers cost that treat tokens one by one, `pairs_*` what the attention does (twice the pairs that
    causality leaves), `*_ratio` shared over repeated.
    """
    tokens = sum(prefix + length for length in responses), prefix + sum(responses)
    pairs = (
        sum((prefix + length) ** 2 for length in responses),
        prefix**2 + sum(length * (2 * prefix + length) for length in responses),
    )
    return {
        "tokens_repeated": tokens[0], "tokens_grouped": tokens[1], "token_ratio": tokens[1] / tokens[0],
        "pairs_repeated": pairs[0], "pairs_grouped": pairs[1], "pair_ratio": pairs[1] / pairs[0],
    }  # fmt: skip


# the row


class Segments:
    """Neighbouring segments of the row, each causal in itself.

    Attributes:
        start: of the first.
        stop: of the last.
        count: how many.
        longest: tokens of the longest.
    """

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        lengths = [length for length in lengths if length]
        self.start, self.stop = start, start + sum(lengths)
        self.count, self.longest = len(lengths), max(lengths, default=0)
        self._index = self._inside = self._place = None
        if min(lengths, default=0) < self.longest:
            sizes = torch.tensor(lengths, device=device)
            offset = torch.arange(self.longest, device=device)
            # padding repeats the segment's last token, whose log-sum-exp then fits its keys in the backward
            index = start + (sizes.cumsum(0) - sizes)[:, None] + torch.minimum(offset, sizes[:, None] - 1)
            self._inside = offset < sizes[:, None]
            self._index, self._place = index.flatten(), self._inside.flatten().nonzero().flatten()

    def padded(self, x: Tensor) -> Tensor:
        """(count, ..., longest, ...) of the row x (N, H, ...): segments as a batch, heads before tokens."""
        rows = x[self.start : self.stop] if self._index is None else x.index_select(0, self._index)
        return rows.unflatten(0, (self.count, self.longest)).transpose(1, 2)

    def flat(self, x: Tensor) -> Tensor:
        """(stop - start, H, ...): the inverse of `padded`."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows if self._place is None else rows.index_select(0, self._place)

    def without_padding(self, x: Tensor) -> Tensor:
        """x (count, H, longest, d) with 0 on the padding."""
        return x if self._inside is None else x * self._inside[:, None, :, None]


class Layout:
    """Segments of the row, and which responses share which prefix.

    Args:
        prefixes: tokens of each shared prompt.
        responses: tokens of the responses to each of them.
        alone: tokens of each row that shares nothing.
        device: where the row is.

    Attributes:
        segments: the three kinds of segments, without those that there are none of.
        prefixes: where all shared prompts stand.
        responses: where all responses to them stand.
        sharing: responses to one prompt, and this prompt, where there is a token of a response.
        calls: how many layers have attended.
    """

    def __init__(
        self, prefixes: Sequence[int], responses: Sequence[Sequence[int]], alone: Sequence[int], device: torch.device
    ) -> None:
        sums = [sum(lengths) for lengths in responses]
        kinds = [prefixes, [length for lengths in responses for length in lengths], alone]
        starts = [0, sum(prefixes), sum(prefixes) + sum(sums)]
        self.segments = [
            Segments(start, lengths, device) for start, lengths in zip(starts, kinds, strict=True) if any(lengths)
        ]
        self.prefixes, self.responses = slice(0, starts[1]), slice(starts[1], starts[2])
        pairs = zip(slices(starts[1], sums), slices(0, prefixes), strict=True)
        self.sharing = [(queries, keys) for queries, keys in pairs if queries.start < queries.stop]
        self.calls = 0
        self._lengths = [length for lengths in kinds for length in lengths if length], sums, prefixes
        self._device = device

    @functools.cached_property
    def own(self) -> Spans:
        """Every segment, as queries and as keys."""
        ends, longest = self._ends(self._lengths[0])
        return ends, ends, longest, longest

    @functools.cached_property
    def across(self) -> Spans:
        """The responses to each prompt among `responses`, and the prompts among `prefixes`."""
        (queries, longest), (keys, longest_key) = self._ends(self._lengths[1]), self._ends(self._lengths[2])
        return queries, keys, longest, longest_key

    def _ends(self, lengths: Sequence[int]) -> tuple[Tensor, int]:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self._device), max(lengths)


Spans = tuple[Tensor, Tensor, int, int]
"""Where sequences of queries and of keys begin and end, (n + 1,) int32 each, and the longest of each."""


def slices(start: int, lengths: Sequence[int]) -> list[slice]:
    """Neighbouring stretches of these lengths."""
    ends = list(accumulate(lengths, initial=start))
    return [slice(begin, end) for begin, end in pairwise(ends)]


@dataclass(frozen=True)
class Row:
    """A micro-batch as one row of N tokens, of which M predict a token whose log-prob is wanted.

    Attributes:
        input_ids: (1, N) int64.
        position_ids: (1, N) int64; every response goes on from the end of its prompt.
        predict: (M,) int64, place of the token before each wanted one; before the first of a response, its prompt's last.
        labels: (M,) int64, the wanted tokens, in the order of rows and columns.
        wanted: (b, T) bool.
        mask: (b, T) bool, of the batch. If it is empty one token is wanted all the same, and its result not used.
        layout: the segments.
    """

    input_ids: Tensor
    position_ids: Tensor
    predict: Tensor
    labels: Tensor
    wanted: Tensor
    mask: Tensor
    layout: Layout

    @classmethod
    def of(cls, batch: Packed, min_group: int, min_prefix: int) -> Row:
        """The rows of `batch` (see the hook), those with equal prompts together.

        Raises:
            DataError: if the attention mask hides the token before a wanted one.
        """
        ids, device = batch.input_ids, batch.input_ids.device
        rows, width = ids.shape
        start = width - batch.responses.shape[1]
        mask = batch.mask.bool()
        wanted = mask.clone()
        wanted[0, 0] |= ~mask.any()  # the ranks of a sharded model call it equally often
        there = wanted.any(1)
        seen = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
        column = torch.arange(width - start, device=device)
        prompt = seen[:, :start]
        last = (wanted * column).amax(1)[:, None]  # which predicts no wanted token
        answer = seen[:, start:] & (column < last)
        group, first, shared = grouped(torch.where(prompt, ids[:, :start], -1), there, min_group, min_prefix)
        leads = shared & (first == torch.arange(rows, device=device))

        place = torch.arange(rows * width, device=device).view(rows, width)
        order = torch.argsort(torch.where(shared, group, rows), stable=True)  # one group after the other, then the rest
        source = torch.cat([
            place[order, :start][(prompt & leads[:, None])[order]],
            place[order, start:][(answer & shared[:, None])[order]],
            place[torch.cat([prompt, answer], 1) & (there & ~shared)[:, None]],
        ])  # fmt: skip
        at = torch.full_like(place, -1).flatten().index_copy(0, source, torch.arange(len(source), device=device))
        row, token = wanted.nonzero(as_tuple=True)
        before = torch.where((token == 0) & shared[row], first[row], row)
        predict = at.view(rows, width)[before, start + token - 1]
        if bool((predict < 0).any()):
            raise DataError("prefix-grouper: the attention mask hides the token before one whose log-prob is wanted")

        positions = batch.position_ids
        if positions is None:
            positions = torch.arange(width, device=device).expand(rows, width)
        kind = torch.where(shared, torch.where(leads, LEADS, FOLLOWS), torch.where(there, ALONE, ABSENT))
        sizes = torch.stack([kind, prompt.sum(1), answer.sum(1)], 1)[order].tolist()
        return cls(
            ids.flatten()[source][None], positions.flatten()[source][None], predict, batch.responses[row, token], wanted,
            mask, layout_of(sizes, device),
        )  # fmt: skip

    def unpacked(self, x: Tensor) -> Tensor:
        """x (M,) as (b, T), 0 outside of the mask."""
        result = x.new_zeros(self.wanted.shape).masked_scatter(self.wanted, x)
        return torch.where(self.mask, result, 0.0)


def grouped(prompts: Tensor, counted: Tensor, min_group: int, min_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with equal prompts.

    Args:
        prompts: (b, P) int64, -1 on the padding.
        counted: (b,) bool, rows with a wanted token; the others are in no group.
        min_group: rows that a group must have.
        min_prefix: tokens that its prompt must have.

    Returns:
        (b,) int64 number of each row's prompt; (b,) int64 the first counted row of that prompt; (b,) bool whether it is shared.
    """
    group = torch.unique(prompts, dim=0, return_inverse=True)[1]
    row = torch.arange(len(prompts), device=prompts.device)
    size = torch.zeros_like(row).index_add(0, group, counted.long())[group]
    first = torch.full_like(row, len(prompts)).scatter_reduce(0, group, torch.where(counted, row, len(prompts)), "amin")
    shared = counted & (size >= min_group) & ((prompts >= 0).sum(1) >= min_prefix)
    return group, first[group], shared


LEADS, FOLLOWS, ALONE, ABSENT = range(4)


def layout_of(sizes: Sequence[Sequence[int]], device: torch.device) -> Layout:
    """The layout of rows that stand in the order of their groups.

    Args:
        sizes: of every row whether it leads a group, follows, is alone or absent, and the tokens of prompt and response.
        device: where the row is.
    """
    prefixes: list[int] = []
    responses: list[list[int]] = []
    alone = []
    for kind, prompt, answer in sizes:
        if kind == LEADS:
            prefixes.append(prompt)
            responses.append([answer])
        elif kind == FOLLOWS:
            responses[-1].append(answer)
        elif kind == ALONE:
            alone.append(prompt + answer)
    return Layout(prefixes, responses, alone, device)


# attention


def merged(out: Tensor, lse: Tensor, further: Tensor, further_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys at once, (N, H, d) and its log-sum-exp (N, H), from that to each of them."""
    both = torch.logaddexp(lse, further_lse)
    weight, further_weight = (lse - both).exp()[..., None], (further_lse - both).exp()[..., None]
    return (out * weight + further * further_weight).to(out.dtype), both


def grouped_attention(attend: Attend, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Causal attention in every segment, and of responses to their shared prefix.

    Args:
        attend: attention with its log-sum-exp.
        q: (N, H, d).
        k: (N, H_kv, d).
        v: (N, H_kv, d).
        layout: the row.

    Returns:
        Output (N, H, d) and log-sum-exp (N, H).
    """
    own = []
    for segments in layout.segments:
        out, lse = attend(segments.padded(q), segments.padded(k), segments.padded(v), True)
        own.append((segments.flat(out), segments.flat(lse)))
    out, lse = (torch.cat(parts) for parts in zip(*own, strict=True))
    if not layout.sharing:
        return out, lse
    shared = []
    for queries, keys in layout.sharing:
        part, part_lse = attend(heads(q[queries]), heads(k[keys]), heads(v[keys]), False)
        shared.append((tokens(part), tokens(part_lse)))
    at = layout.responses
    joined, joined_lse = merged(out[at], lse[at], *(torch.cat(parts) for parts in zip(*shared, strict=True)))
    return (
        torch.cat([out[: at.start], joined, out[at.stop :]]),
        torch.cat([lse[: at.start], joined_lse, lse[at.stop :]]),
    )


def heads(x: Tensor) -> Tensor:
    """(1, H, S, ...) of (S, H, ...)."""
    return x.transpose(0, 1)[None]


def tokens(x: Tensor) -> Tensor:
    """(S, H, ...) of (1, H, S, ...)."""
    return x[0].transpose(0, 1)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`Attend` by its formula, scores in memory; scores are capped to `softcap` * tanh(score / `softcap`) if it is given."""
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    # query heads with the same keys as more queries, instead of copies of the keys
    q = q.unflatten(1, (k.shape[1], shared)).flatten(2, 3)
    scores = (q @ k.transpose(2, 3) * scale).unflatten(2, (shared, -1)).flatten(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(v.dtype).unflatten(1, (-1, shared)).flatten(2, 3)
    return (weights @ v).view(len(q), heads, -1, v.shape[-1]), lse


class FusedAttention(torch.autograd.Function):
    """`grouped_attention` with torch's flash attention: nothing is kept for the backward but its arguments and results.

    The kernel's backward recomputes the weights of a query's keys from the log-sum-exp over all of them, so each part gets
    the merged output and log-sum-exp, and the parts' gradients add up (as in ring attention).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        """Output (N, H, d)."""
        kernel = VarlenKernel(layout, scale) if q.is_cuda else PaddedKernel(layout, scale)
        out, lse = kernel.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel = kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        return (*ctx.kernel.backward(grad, *ctx.saved_tensors), None, None)


@dataclass(frozen=True)
class PaddedKernel:
    """Flash attention on the CPU, which takes batches: segments are padded to the longest of their kind."""

    layout: Layout
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `grouped_attention`."""
        return grouped_attention(self._attend, q, k, v, self.layout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(q, k, v, 0.0, causal, scale=self.scale)

    def _backward(self, grad: Tensor, inputs: Sequence[Tensor], out: Tensor, lse: Tensor, causal: bool) -> Any:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, *inputs, out, lse.contiguous(), 0.0, causal, scale=self.scale)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        """Gradients of q, k and v."""
        found = [torch.empty_like(x) for x in (q, k, v)]
        for segments in self.layout.segments:
            grad_, q_, k_, v_, out_, lse_ = (segments.padded(x) for x in (grad, q, k, v, out, lse))
            parts = self._backward(segments.without_padding(grad_), (q_, k_, v_), out_, lse_, True)
            for whole, part in zip(found, parts, strict=True):
                whole[segments.start : segments.stop] = segments.flat(part)
        for queries, keys in self.layout.sharing:
            inputs = heads(q[queries]), heads(k[keys]), heads(v[keys])
            grad_, out_, lse_ = (heads(x[queries]) for x in (grad, out, lse))
            parts = self._backward(grad_, inputs, out_, lse_, False)
            for whole, place, part in zip(found, (queries, keys, keys), parts, strict=True):
                whole[place] += tokens(part)
        return found


@dataclass(frozen=True)
class VarlenKernel:
    """Flash attention on a GPU, which takes rows of segments: two calls, without padding."""

    layout: Layout
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `grouped_attention`."""
        layout = self.layout
        out, lse = self._attend(q, k, v, layout.own, True)
        if layout.sharing:
            queries, keys = layout.responses, layout.prefixes
            further = self._attend(q[queries], k[keys], v[keys], layout.across, False)
            out[queries], lse[queries] = merged(out[queries], lse[queries], *further)
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        """Gradients of q, k and v."""
        layout = self.layout
        found = self._backward(grad, (q, k, v), out, lse, layout.own, True)
        if layout.sharing:
            queries, keys = layout.responses, layout.prefixes
            inputs = q[queries], k[keys], v[keys]
            parts = self._backward(grad[queries], inputs, out[queries], lse[queries], layout.across, False)
            for whole, place, part in zip(found, (queries, keys, keys), parts, strict=True):
                whole[place] += part
        return found

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._flash_attention_forward
        out, lse, *_ = attend(q, k, v, *spans, 0.0, causal, return_debug_mask=False, scale=self.scale)
        return out, lse.transpose(0, 1)

    def _backward(
        self, grad: Tensor, inputs: Sequence[Tensor], out: Tensor, lse: Tensor, spans: Spans, causal: bool
    ) -> list[Tensor]:
        backward = torch.ops.aten._flash_attention_backward
        state = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # of the dropout that there is none of
        unused = torch.empty(0, device=grad.device)
        lse = lse.transpose(0, 1).contiguous()
        found = backward(grad.contiguous(), *inputs, out, lse, *spans, 0.0, causal, state, unused, scale=self.scale)
        return list(found)


def attention(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, **further: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """An attention function of transformers: `grouped_attention` if the model's forward was given a `Layout`.

    Args:
        original: name of the implementation for every other call.
        module: the model's attention layer.
        query: (1, H, N, d).
        key: (1, H_kv, N, d).
        value: (1, H_kv, N, d).
        attention_mask: a placeholder of one number.
        scaling: of the scores; 1 / sqrt(d) if None.
        dropout: must be 0.
        softcap: bound of the scores.
        further: what else the layer passes.

    Returns:
        Output (1, N, H, d), and None instead of the weights.
    """
    layout = further.pop(ARGUMENT, None)
    if layout is None:
        capped = {} if softcap is None else {"softcap": softcap}
        options = {"scaling": scaling, "dropout": dropout, **capped, **further}
        return original_attention(original, module, query, key, value, attention_mask, options)
    check_call(original, attention_mask, dropout, softcap, further)
    layout.calls += 1
    if torch.is_autocast_enabled(query.device.type):  # as it is for torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tokens(x) for x in (query, key, value))
    if original == "eager" or softcap is not None or not has_kernel(query, value):
        attend = functools.partial(plain_attention, scale=scale, softcap=softcap)
        return grouped_attention(attend, q, k, v, layout)[0][None], None
    size = v.shape[-1]
    if size < q.shape[-1]:  # the kernels want one size
        v = nn.functional.pad(v, (0, q.shape[-1] - size))
    return FusedAttention.apply(q, k, v, layout, scale)[None, ..., :size], None


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch has a flash attention for such tensors that gives its log-sum-exp."""
    size = query.shape[-1]
    if value.shape[-1] > size:
        return False
    if query.is_cuda:
        capable = torch.cuda.get_device_capability(query.device) >= (8, 0)
        return capable and query.dtype in (torch.bfloat16, torch.float16) and size <= 256 and size % 8 == 0
    return query.device.type == "cpu"


def original_attention(
    original: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """What the layer would have called without the plugin."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(original, own)
    with named(module.config, original):  # which some implementations look up again
        return function(module, query, key, value, mask, **options)


@contextlib.contextmanager
def named(config: Any, name: str) -> Iterator[None]:
    """The model's attention implementation under another name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
     "return_dict", "is_causal"}
)  # fmt: skip
"""What layers pass to their attention and what does not change it."""


def check_call(
    original: str, mask: Tensor | None, dropout: float, softcap: float | None, further: dict[str, Any]
) -> None:
    """Raise if a layer attends in a way that `grouped_attention` does not.

    Raises:
        ConfigurationError: with the reason.
    """
    if further.get("sliding_window") is not None:
        refuse(f"it has a sliding window ({further['sliding_window']} tokens)")
    if dropout > 0:
        refuse(f"it has a dropout of {dropout:g} on its attention weights: set it to 0")
    if softcap is not None and original == "sdpa":
        refuse("sdpa does not cap the scores of its attention: load it with attn_implementation='eager'")
    if mask is not None and mask.numel() > 1:
        refuse("it makes a mask or a bias of its own for its attention")
    if further.get("is_causal") is False:
        refuse("its attention is not causal")
    given = {name for name, value in further.items() if value is not None and value is not False}
    unknown = sorted(given - HARMLESS)
    if unknown:
        refuse(f"its layers pass something unknown to their attention: {', '.join(unknown)}")


def refuse(reason: str) -> NoReturn:
    """Raise a `ConfigurationError`."""
    raise ConfigurationError(f"prefix-grouper cannot be used with this model: {reason}")


# the model


def logits_of(model: Any, row: Row) -> Tensor:
    """The logits (M, V) float32 that predict the wanted tokens, in one call of the model."""
    inner = prepared(model)
    given = {
        "input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False, ARGUMENT: row.layout,
        "attention_mask": torch.zeros(1, 1, 1, 1, device=row.input_ids.device),  # of four dimensions: no other is made
    }  # fmt: skip
    optional = {"logits_to_keep": row.predict, "output_router_logits": False}
    known = inspect.signature(inner.forward).parameters
    output = model(**given, **{name: value for name, value in optional.items() if name in known})
    layers = inner.config.num_hidden_layers
    if row.layout.calls < layers:
        refuse(
            f"only {row.layout.calls} of its {layers} layers hand to transformers' attention what its forward is given"
        )
    logits = output.logits[0]
    return (logits if "logits_to_keep" in known else logits[row.predict]).float()


_prepared: weakref.WeakKeyDictionary[nn.Module, set[bool]] = weakref.WeakKeyDictionary()
"""Models that were checked, and in which modes (training or not)."""


def prepared(model: Any) -> Any:
    """The transformers model in `model` (itself, or what a trainer wrapped), whose attention takes a `Layout`.

    Raises:
        ConfigurationError: if it is none, or one whose numbers would be wrong.
    """
    from transformers import PreTrainedModel

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        refuse(f"{type(model).__name__} holds no model of transformers")
    modes = _prepared.setdefault(inner, set())
    if inner.training not in modes:
        check_model(inner)
        register(inner)
        modes.add(inner.training)
    return inner


def check_model(model: Any) -> None:
    """Raise if the model mixes tokens otherwise than by attention over positions, or draws random numbers.

    Raises:
        ConfigurationError: with the reason.
    """
    config = model.config
    if config.get_text_config() is not config:
        refuse("it has parts for other things than text")
    files = {type(module).__module__ for module in model.modules()}
    if not any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files):
        refuse("it does not use transformers' attention interface")
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        refuse("its forward takes no position_ids, so responses cannot all start after their prompt")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        refuse("its forward passes no further arguments on to its attention")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others:
        refuse(f"it has layers of other kinds than full attention: {', '.join(sorted(others))}")
    mixing = any(isinstance(module, nn.Conv1d | nn.RNNBase) for module in model.modules())
    if mixing or getattr(model, "_is_stateful", False):
        refuse("it has a state that runs through the tokens (convolution, recurrence, Mamba)")
    if getattr(config, "attn_temperature_tuning", False):
        refuse("the scale of its attention depends on a token's place in the row (attn_temperature_tuning)")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        refuse("its rotation depends on the longest row of a micro-batch (rope_type dynamic or longrope)")
    if model.training and (found := dropout_of(model)):
        refuse(f"it draws random numbers in training ({found}): set them to 0")


def dropout_of(model: nn.Module) -> str:
    """A dropout or jitter of the model that is not 0, with its name; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"{name} {module.p:g}"
        for attribute, value in vars(module).items():
            if ("drop" in attribute or "jitter" in attribute) and isinstance(value, float) and value > 0:
                return f"{name}.{attribute} {value:g}"
    return ""


def register(model: Any) -> None:
    """Give the model an attention implementation that takes a `Layout`, and for calls without one does what it did before.

    The model keeps it: gradient checkpointing calls the layers again in the backward.

    Raises:
        ConfigurationError: if its attention cannot be replaced.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    original = model.config._attn_implementation
    if original.startswith(NAME):  # a copy of a model that has it
        return
    if original not in {"eager", "sdpa", "flex_attention"} and "flash" not in original:
        refuse(f"it has an attention implementation of its own, {original!r}")
    name = NAME + original
    AttentionInterface.register(name, functools.partial(attention, original))
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.config._attn_implementation = name
