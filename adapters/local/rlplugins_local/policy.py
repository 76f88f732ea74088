"""The model: generation with a cache, and log-probs of given responses."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlplugins.errors import DataError, ServiceError
from rlplugins.packed import Packed
from rlplugins.rollouts import Sampling

TOKENS_PER_PASS = 16_384
COMPACT_BELOW = 0.75  # share of running rows at which the finished ones leave the batch

ProcessLogits = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass
class Sequences:
    """N prompts, left-padded, with their responses, right-padded.

    Attributes:
        prompts: (N, P) int64.
        prompt_lengths: (N,) int64.
        responses: (N, T) int64.
        mask: (N, T) bool, tokens whose log-probs are wanted.
        response_lengths: (N,) int64, up to the last of these tokens.
    """

    prompts: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    mask: Tensor
    response_lengths: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor) -> Sequences:
        """From lists of token ids and right-padded responses."""
        padded, lengths = left_padded(prompts)
        last = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask.bool()
        ends = last.amax(1) if mask.shape[1] else torch.zeros_like(lengths)
        return cls(padded, lengths, responses.cpu(), mask.bool().cpu(), ends.cpu())

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    def take(self, rows: Tensor) -> Sequences:
        """The rows `rows` without the padding that they share."""
        prompt_lengths, response_lengths = self.prompt_lengths[rows], self.response_lengths[rows]
        start = self.prompts.shape[1] - int(prompt_lengths.max())
        end = max(1, int(response_lengths.max()))
        return Sequences(
            self.prompts[rows, start:],
            prompt_lengths,
            self.responses[rows, :end],
            self.mask[rows, :end],
            response_lengths,
        )


def packed(sequences: Sequences, device: torch.device, entropy: bool) -> Packed:
    """Rows of similar length as `forward` takes them."""
    prompts = sequences.prompts
    attention = prompt_mask(sequences.prompt_lengths, prompts.shape[1], sequences.responses.shape[1])
    positions = None
    if attention is not None:
        positions = (attention.cumsum(1) - 1).clamp(min=0).to(device)
        attention = attention.to(device)
    responses = sequences.responses.to(device)
    ids = torch.cat([prompts.to(device), responses], 1)
    return Packed(ids, attention, positions, responses, sequences.mask.to(device), entropy)


@dataclass
class Outputs:
    """What a pass gives, each (b, T): 0 outside of the mask, None if not asked for."""

    log_probs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Drawn:
    """Responses as they were drawn: (N, T) each, right-padded with 0."""

    responses: Tensor
    mask: Tensor
    prefix: Tensor | None
    log_probs: Tensor


class Policy:
    """A Hugging Face causal language model with its tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        device: where it runs.

    Attributes:
        value_head: the critic, if there is one.
        reference: the reference policy, if there is one.
        owner: the plugin's `forward`, if there is one.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self.value_head: nn.Linear | None = None
        self.reference: nn.Module | None = None
        self.owner: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self._end_tokens = torch.tensor(sorted(end_tokens(model, tokenizer)), dtype=torch.int64, device=device)
        self._encoded: dict[str, list[int]] = {}

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Policy:
        """From a folder that `save_pretrained` wrote.

        Raises:
            DataError: if it holds no model or no tokenizer.
        """
        tokenizer = load_tokenizer(folder)
        return cls(load_model(folder, dtype), tokenizer, device)

    def add_value_head(self) -> None:
        """A linear critic on the last hidden state, which starts at 0 and sends no gradient into the model."""
        size = self.model.config.get_text_config().hidden_size
        head = nn.Linear(size, 1, device=self.device, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.value_head = head

    def copy_reference(self) -> None:
        """Give the reference the present weights."""
        if self.reference is None:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        else:
            self.reference.load_state_dict(self.model.state_dict())

    # text

    def encode(self, texts: Sequence[Any]) -> list[list[int]]:
        """Token ids of prompts, texts or lists of chat messages."""
        keys = [text if isinstance(text, str) else repr(text) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._encoded}
        plain = [text for text in new.values() if isinstance(text, str)]
        encoded = iter(self.tokenizer(plain).input_ids if plain else [])
        for key, text in new.items():
            tokens = next(encoded) if isinstance(text, str) else self._chat(text)
            if not tokens:
                raise DataError(f"the tokenizer makes no token of the prompt {text!r}")
            self._encoded[key] = tokens
        return [self._encoded[key] for key in keys]

    def _chat(self, messages: Any) -> list[int]:
        if not self.tokenizer.chat_template:
            raise DataError("the prompts are chat messages, but the tokenizer of the model has no chat template")
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]

    def encode_prefixes(self, prefixes: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of forced response prefixes, texts or token ids each."""
        texts = [prefix for prefix in prefixes if isinstance(prefix, str) and prefix]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
        return [(next(encoded) if prefix else []) if isinstance(prefix, str) else list(prefix) for prefix in prefixes]

    def encode_responses(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[list[int]]:
        """Token ids of given responses, texts or lists of chat messages, each with an end token."""
        texts = [self._response(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        ends, end = set(self._end_tokens.tolist()), self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return [row if end is None or (row and row[-1] in ends) else [*row, end] for row in encoded]

    def _response(self, prompt: Any, response: Any) -> str:
        """What a response adds to its prompt; after chat messages in the words of the chat template."""
        if isinstance(prompt, str):
            return str(response)
        self._chat(prompt)  # says so if there is no template
        answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        start = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = self.tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        if not whole.startswith(start):
            raise DataError("the chat template of the tokenizer changes the prompt when a response follows: give prompts and "
                            "responses as texts")  # fmt: skip
        return str(whole[len(start) :]).rstrip("\n")

    # log-probs

    def forward(
        self, sequences: Sequences, temperature: float, *, entropy: bool = False, values: bool = False,
        reference: bool = False,
    ) -> Outputs:  # fmt: skip
        """Log-probs of the responses (b, T), and what else is asked for, in one pass.

        Args:
            sequences: rows of similar length.
            temperature: of the distribution.
            entropy: whether its entropies are wanted.
            values: whether the critic's values are wanted.
            reference: take the reference policy.
        """
        batch = packed(sequences, self.device, entropy)
        model = self.reference if reference else self.model
        assert model is not None
        if self.owner is not None:
            result = Outputs(*self.owner(model, batch, temperature))
            if not values:
                return result
        tokens = batch.responses.shape[1]
        output = self._call(model, batch.input_ids, batch.attention_mask, batch.position_ids, keep=tokens + 1,
                            use_cache=False, output_hidden_states=values)  # fmt: skip
        if self.owner is None:
            result = token_log_probs(output.logits[:, -tokens - 1 : -1], batch, temperature)
        if values:
            assert self.value_head is not None
            hidden = output.hidden_states[-1][:, -tokens - 1 : -1].detach().float()
            result.values = self.value_head(hidden).squeeze(-1) * batch.mask
        return result

    def passes(
        self, sequences: Sequences, temperature: float, micro_batch_size: int | None, units: Tensor | None = None,
        **wanted: bool,
    ) -> Outputs:  # fmt: skip
        """`forward` on any number of rows, without gradient; results (N, T) on the CPU. Rows of one unit stay together."""
        results: dict[str, Tensor] = {}
        with torch.no_grad():
            for rows in cut(sequences.lengths, micro_batch_size, units):
                outputs = self.forward(sequences.take(rows), temperature, **wanted)
                for name, part in vars(outputs).items():
                    if part is not None:
                        column = results.setdefault(name, torch.zeros(sequences.mask.shape))
                        column[rows, : part.shape[1]] = part.float().cpu()
        return Outputs(**({"log_probs": torch.zeros(sequences.mask.shape)} | results))

    def _call(
        self, model: nn.Module, ids: Tensor, attention: Tensor | None, positions: Tensor | None, *, keep: int,
        **further: Any,
    ) -> Any:  # fmt: skip
        """One forward pass; `keep`: how many of the last positions need logits."""
        optional = {"attention_mask": attention, "position_ids": positions, "logits_to_keep": keep}
        known = {name: value for name, value in optional.items() if value is not None and name in self._accepted}
        return model(input_ids=ids, **known, **further)

    # generation

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], prefixes: Sequence[Sequence[int]], sampling: Sampling, seed: int,
        *, greedy: bool = False, process: ProcessLogits | None = None,
    ) -> Drawn:  # fmt: skip
        """One response per row, each with its own parameters, up to an end token (which is part of it).

        Args:
            prompts: N lists of token ids.
            prefixes: N beginnings of the response to continue from.
            sampling: parameters of the rows; `max_tokens` counts what is drawn, not the prefix.
            seed: of the random numbers.
            greedy: take the most likely token.
            process: changes the logits of the running rows, given their numbers.
        """
        contexts = [tuple(prompt) + tuple(prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        source = torch.Generator(self.device).manual_seed(seed)
        sampler = Sampler(sampling, self.device, source, greedy, process)
        responses, mask, log_probs = self._draw(contexts, sampler)
        return _with_prefixes(responses.cpu(), mask.cpu(), log_probs.cpu(), prefixes)

    def _draw(self, contexts: list[tuple[int, ...]], sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and log-probs (N, T) of what is drawn after each context."""
        longest = int(sampler.max_tokens.max())
        logits, cache, attention = self._prefill(contexts, longest)
        width = logits.shape[0], longest
        responses = torch.zeros(width, dtype=torch.int64, device=self.device)
        mask = torch.zeros(width, dtype=torch.bool, device=self.device)
        log_probs = torch.zeros(width, device=self.device)
        size = max(map(len, contexts))
        rows = torch.arange(len(contexts), device=self.device)  # of those still in the batch
        running = torch.ones_like(rows, dtype=torch.bool)
        for place in range(longest):
            tokens, drawn = sampler(logits, rows)
            responses[rows, place] = tokens * running
            log_probs[rows, place] = drawn * running
            mask[rows, place] = running
            running = running & ~torch.isin(tokens, self._end_tokens) & (place + 1 < sampler.max_tokens[rows])
            left = int(running.sum())
            if not left:
                break
            if left < COMPACT_BELOW * len(rows) and hasattr(cache, "batch_select_indices"):
                kept = running.nonzero().flatten()
                cache.batch_select_indices(kept)
                rows, tokens, running = rows[kept], tokens[kept], running[kept]
                attention = attention[kept] if attention is not None else None
            seen = attention[:, : size + place + 1] if attention is not None else None
            positions = seen.sum(1, keepdim=True) - 1 if seen is not None else None
            output = self._call(
                self.model, tokens[:, None], seen, positions, keep=1, use_cache=True, past_key_values=cache
            )
            logits, cache = output.logits[:, -1], output.past_key_values
        return responses[:, : place + 1], mask[:, : place + 1], log_probs[:, : place + 1]

    def _prefill(self, contexts: list[tuple[int, ...]], more: int) -> tuple[Tensor, Any, Tensor | None]:
        """Logits of the next token (N, V), cache and mask (N, P + more); equal contexts are computed once."""
        distinct = list(dict.fromkeys(contexts))
        place = {context: row for row, context in enumerate(distinct)}
        copies = torch.tensor([place[context] for context in contexts])
        ids, lengths = left_padded(distinct)
        attention = prompt_mask(lengths, ids.shape[1], more)
        positions = None
        seen = None
        if attention is not None:
            attention = attention.to(self.device)
            seen = attention[:, : ids.shape[1]]
            positions = (seen.cumsum(1) - 1).clamp(min=0)
        output = self._call(self.model, ids.to(self.device), seen, positions, keep=1, use_cache=True)
        logits, cache = output.logits[:, -1], output.past_key_values
        if len(distinct) == len(contexts):
            return logits, cache, attention
        if not hasattr(cache, "batch_select_indices"):
            raise ServiceError(f"the cache of {type(self.model).__name__} cannot be shared between equal prompts")
        copies = copies.to(self.device)
        cache.batch_select_indices(copies)
        return logits[copies], cache, attention[copies] if attention is not None else None


class Sampler:
    """Draws the next tokens of a batch whose rows have parameters of their own."""

    def __init__(
        self, sampling: Sampling, device: torch.device, source: torch.Generator, greedy: bool,
        process: ProcessLogits | None,
    ) -> None:  # fmt: skip
        self.max_tokens = sampling.max_tokens.to(device)
        self._temperature = (torch.zeros_like(sampling.temperature) if greedy else sampling.temperature).to(device)
        self._divisor = torch.where(self._temperature > 0, self._temperature, 1.0)[:, None]
        self._any_greedy = bool((self._temperature == 0).any())
        self._top_p = sampling.top_p.to(device)[:, None] if bool((sampling.top_p < 1).any()) else None
        self._numbers = {name: numbers.to(device) for name, numbers in sampling.numbers.items()}
        self._source = source
        self._process = process

    def __call__(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n,) and their log-probs (n,) from the logits (n, V) of the rows (n,)."""
        logits = logits.float()
        if self._process is not None:
            logits = self._process(logits, {name: numbers[rows] for name, numbers in self._numbers.items()})
        probs = (logits / self._divisor[rows]).softmax(-1)
        if self._any_greedy:
            most_likely = torch.zeros_like(probs).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
            probs = torch.where(self._temperature[rows, None] > 0, probs, most_likely)
        if self._top_p is not None:
            probs = nucleus(probs, self._top_p[rows])
        tokens = torch.multinomial(probs, 1, generator=self._source)
        return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """The probabilities (n, V) without the tail: the fewest most likely tokens that together have top_p (n, 1)."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probs).scatter_(1, order, ordered * (before < top_p))
    return kept / kept.sum(-1, keepdim=True)


def token_log_probs(logits: Tensor, batch: Packed, temperature: float) -> Outputs:
    """Log-probs (b, T), and entropies if wanted, of the responses from the logits (b, T, V) that predict them."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    chosen = logits.gather(-1, batch.responses[..., None])[..., 0] - normaliser
    result = Outputs(torch.where(batch.mask, chosen, 0.0))
    if batch.entropy:
        probs = (logits - normaliser[..., None]).exp()
        result.entropy = torch.where(batch.mask, normaliser - (probs * logits).sum(-1), 0.0)
    return result


def cut(lengths: Tensor, size: int | None, units: Tensor | None = None) -> Iterator[Tensor]:
    """Rows (int64) of each forward pass: rows of similar length together, so that little padding is computed.

    Args:
        lengths: (N,) tokens of each row.
        size: rows per pass; None: as many as fill `TOKENS_PER_PASS`.
        units: (N,) rows of the same number stay together, whatever the size.
    """
    if not len(lengths):
        return
    units = torch.arange(len(lengths)) if units is None else torch.unique(units, return_inverse=True)[1]
    count = int(units.max()) + 1
    rows = torch.bincount(units, minlength=count)
    longest = torch.zeros(count, dtype=lengths.dtype).scatter_reduce(0, units, lengths, "amax")
    order = torch.argsort(longest, stable=True)
    batch: list[int] = []
    taken = 0
    for unit, number, length in zip(order.tolist(), rows[order].tolist(), longest[order].tolist(), strict=True):
        limit = size if size is not None else max(1, TOKENS_PER_PASS // max(1, length))
        if batch and taken + number > limit:
            yield _rows_of(batch, units, order, count)
            batch, taken = [], 0
        batch.append(unit)
        taken += number
    yield _rows_of(batch, units, order, count)


def _rows_of(batch: list[int], units: Tensor, order: Tensor, count: int) -> Tensor:
    """The rows of some units, in the batch's own order."""
    if len(batch) == count:
        return torch.arange(len(units))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[batch] = True
    return chosen[units].nonzero().flatten()


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(N, P) token ids, padded on the left with 0, and their lengths (N,)."""
    longest = max(map(len, prompts), default=0)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.int64)
    return ids.reshape(len(prompts), longest), torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)


def prompt_mask(lengths: Tensor, width: int, more: int) -> Tensor | None:
    """(N, width + more) int64, 0 on the padding of left-padded prompts; None if there is none."""
    if int(lengths.min()) == width:
        return None
    prompts = torch.arange(width) >= width - lengths[:, None]
    return nn.functional.pad(prompts, (0, more), value=True).long()


def _with_prefixes(responses: Tensor, mask: Tensor, log_probs: Tensor, prefixes: Sequence[Sequence[int]]) -> Drawn:
    """The forced prefixes in front of what was drawn."""
    if not any(prefixes):
        return Drawn(responses, mask, None, log_probs)
    sizes = torch.tensor([len(prefix) for prefix in prefixes])
    width = int((sizes + mask.sum(1)).max())
    place = torch.arange(width)[None, :] - sizes[:, None]
    forced, _ = left_padded([list(prefix)[::-1] for prefix in prefixes])
    forced = nn.functional.pad(forced.flip(1), (0, width))[:, :width]
    inside = place.clamp(0, mask.shape[1] - 1)
    drawn = (place >= 0) & (place < mask.shape[1]) & mask.gather(1, inside)
    prefix = place < 0
    return Drawn(
        torch.where(prefix, forced, responses.gather(1, inside) * drawn),
        prefix | drawn,
        prefix,
        log_probs.gather(1, inside) * drawn,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is not the folder of a Hugging Face model: it has no config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DataError(f"{folder} has no tokenizer that transformers can load: {error}") from error


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The causal language model of a folder, without dropout."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:
        raise DataError(f"{folder} holds no causal language model that transformers can load: {error}") from error
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # to memory whose alignment does not depend on the file
    return model


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a response."""
    found: set[int] = set()
    for owner in (model.generation_config, tokenizer):
        tokens = getattr(owner, "eos_token_id", None)
        found |= {tokens} if isinstance(tokens, int) else set(tokens or ())
    return found
