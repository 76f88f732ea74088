"""The stack in `train_dpo`: one plain process per rank, in which everything is bound.

OpenRLHF reads one micro-batch after the other, and its loss is a mean over each. The stack's is a mean over the mini-batch.
So the loader is read one mini-batch ahead: its pairs pass `build_preferences`, the reference's log-probs are computed, and
`prepare_mini_batch` runs on all ranks before the first of its micro-batches is handed on. The loss then is a micro-batch's
part, from the log-probs of the tokens that OpenRLHF's own forward computed.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlplugins.defaults import NllOnChosen, over_tokens
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import HOOKS
from rlplugins.imports import after_import
from rlplugins.pairs import SIDES, Pairs
from rlplugins.plan import PREFERENCES, REWARDS, objective_of
from rlplugins.plugin import BuiltinName
from rlplugins.preferences import PairLoss, PairMiniBatch
from rlplugins.rollouts import Column, Columns, Prompts, as_column
from rlplugins.stack import Stack, StackConfig
from rlplugins.steps import Metrics, Run
from rlplugins.table import PromptTable
from rlplugins.trainer import Trainer
from rlplugins_openrlhf.columns import to_responses
from rlplugins_openrlhf.pool import keys_of
from rlplugins_openrlhf.settings import at

logger = logging.getLogger("rlplugins.openrlhf")

FLAGS = "openrlhf.utils.config"
DATA = "openrlhf.datasets.reward_dataset"
TRAINING = "openrlhf.trainer.dpo_trainer"
REFERENCE = "reference.safetensors"
BINDS = frozenset(hook for hook in HOOKS if objective_of(hook) in (None, PREFERENCES)) - {"forward", "on_validation"}


def install(config: StackConfig) -> None:
    """Check the stack when the flags are read; bind data set and trainer when they are made."""
    after_import(FLAGS, functools.partial(check_flags, config=config))
    after_import(DATA, keep_places)
    after_import(TRAINING, functools.partial(bind_trainer, config=config))


def check_flags(module: ModuleType, config: StackConfig) -> None:
    """OpenRLHF nests its flags right after it has parsed them, before anything is loaded: the place to refuse."""
    original = module.hierarchize

    @functools.wraps(original)
    def hierarchize(args: Any) -> Any:
        nested = original(args)
        build_stack(nested, config)
        return nested

    module.hierarchize = hierarchize  # type: ignore[attr-defined]


# settings


def declare(args: Any, columns: Iterable[str] | None = None) -> Trainer:
    """OpenRLHF's `train_dpo` with these flags.

    Args:
        args: OpenRLHF's, nested.
        columns: columns of the data set; None: not read yet.
    """
    nll = float(at(args, "model.nll_loss_coef", 0.0))
    return Trainer(
        name="openrlhf",
        binds=BINDS,
        provides=frozenset({"mini_batch_log_probs"}),
        columns=None if columns is None else frozenset({"ref_log_probs", *columns}),
        defaults={"preference_loss": loss_of(args)},
        extras=[NllOnChosen(coefficient=nll)] if nll else [],
        remedies={"column": "add the column to the data set of pairs", REWARDS: "run train_ppo_ray"},
    )


def loss_of(args: Any) -> BuiltinName:
    """The built-in that the flags of the loss mean."""
    beta = float(at(args, "model.beta", 0.1))
    smoothing = float(at(args, "model.label_smoothing", 0.0))
    if at(args, "model.ipo_enable", False):
        return {"ipo": {"beta": beta, "per_token": False}}
    return {"cdpo": {"beta": beta, "label_smoothing": smoothing}} if smoothing else {"dpo": {"beta": beta}}


def build_stack(args: Any, wanted: StackConfig, columns: Iterable[str] | None = None) -> Stack:
    """The checked stack.

    Raises:
        StackError: if it cannot run here.
        ConfigurationError: if a flag of OpenRLHF cannot be combined with it.
    """
    stack = Stack.from_config(wanted, declare(args, columns))
    if stack.claims("reference_policy"):
        flags = {"--ds.zero_stage 3": int(at(args, "ds.zero_stage", 2)) == 3, "--ds.lora.rank": at(args, "ds.lora.rank", 0),
                 "--ds.load_in_4bit": at(args, "ds.load_in_4bit", False)}  # fmt: skip
        if found := [flag for flag, given in flags.items() if given]:
            raise ConfigurationError(
                f"reference_policy copies all weights, which {', '.join(found)} does not allow: leave it out"
            )
    return stack


# data


class Length(int):
    """Tokens of a prompt, as OpenRLHF's data set gives them, with the place of the pair in the data set."""

    place: int

    @classmethod
    def of(cls, length: int, place: int) -> Length:
        """The length of the prompt at a place."""
        made = cls(length)
        made.place = place
        return made


def keep_places(module: ModuleType) -> None:
    """Let the pairs say where they stand, and the data set keep the columns that OpenRLHF drops."""
    dataset = module.RewardDataset
    make, get = dataset.__init__, dataset.__getitem__

    @functools.wraps(make)
    def __init__(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
        make(self, dataset, *args, **kwargs)
        if self.is_dpo:
            self.rlplugins_columns = columns_of(self, dataset)

    @functools.wraps(get)
    def __getitem__(self: Any, idx: int) -> Any:
        *tokens, extra = get(self, idx)
        return (*tokens, Length.of(extra, idx) if self.is_dpo else extra)

    dataset.__init__, dataset.__getitem__ = __init__, __getitem__


def columns_of(made: Any, dataset: Any) -> dict[str, list[Any]]:
    """The further columns of the pairs that OpenRLHF has kept: it leaves out those whose prompt is too long."""
    taken = {made.prompt_key, made.chosen_key, made.rejected_key}
    if len(made) != len(dataset):
        kept = [row for row in range(len(dataset)) if made.process_data(dataset[row])["prompt"] is not None]
        dataset = dataset.select(kept)
    return {name: list(dataset[name]) for name in dataset.column_names if name not in taken}


# training


def bind_trainer(module: ModuleType, config: StackConfig) -> None:
    """Bind every trainer of pairs when it has been made."""
    trainer = module.DPOTrainer
    make = trainer.__init__

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        DpoRun(self, config).bind()

    trainer.__init__ = __init__


@dataclass
class Window:
    """The pairs of one mini-batch on this rank.

    Attributes:
        micros: OpenRLHF's micro-batches.
        rows: per micro-batch the rows of its pairs in the mini-batch.
        pairs: all of them.
        columns: of the update.
    """

    micros: list[Any]
    rows: list[Tensor]
    pairs: Pairs
    columns: dict[str, Column]


class DpoRun:
    """A run of `train_dpo` on a stack.

    Args:
        trainer: OpenRLHF's.
        config: the user's stack.

    Attributes:
        stack: checked against the columns of the data set.
        done: mini-batches handed on so far.
    """

    def __init__(self, trainer: Any, config: StackConfig) -> None:
        self.trainer = trainer
        self.strategy = trainer.strategy
        self.args = trainer.strategy.args
        self.dataset = trainer.train_dataloader.dataset
        self.stack = build_stack(self.args, config, self.dataset.rlplugins_columns)
        self.references = self.stack.needs("column", "ref_log_probs")
        self.done = 0
        self.total_steps = int(trainer.epochs) * (len(self.dataset) // int(self.args.train.batch_size))
        self._given: list[Any] = []
        self._mini: PairMiniBatch | None = None
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._log_probs: dict[str, Tensor] = {}
        self._batch: Any = None
        texts = list(self.dataset.prompts)
        ids = self.dataset.rlplugins_columns.get("id", [None] * len(texts))
        keys, table = keys_of(ids, texts), PromptTable()
        self.prompts = Prompts(keys, table.resolve(keys), table, texts)
        size = int(self.args.train.batch_size)
        self.stack.start(Run(self.total_steps, 2, 2 * size, self.prompts, int(self.args.train.seed), trainer.tokenizer))

    def bind(self) -> None:
        """Replace what the stack computes, on this trainer alone."""
        trainer = self.trainer
        self.original_forward = trainer.concatenated_forward
        self.original_sums = trainer._get_batch_logps
        self.original_fit = trainer.fit
        self.original_save = trainer.save_logs_and_checkpoints
        trainer.train_dataloader = Loader(trainer.train_dataloader, self)
        trainer.concatenated_forward = self.forward
        trainer._get_batch_logps = self.sums
        trainer.loss_fn = self.loss
        trainer.nll_loss = False  # it is one of the stack's auxiliary losses
        trainer.fit = self.fit
        trainer.save_logs_and_checkpoints = self.save

    def fit(self, args: Any, consumed_samples: int = 0, *rest: Any, **kwargs: Any) -> Any:
        """OpenRLHF's loop, from the step at which its checkpoint was written."""
        self.done = consumed_samples // int(args.train.batch_size)
        if self.done:
            self.load()
        return self.original_fit(args, consumed_samples, *rest, **kwargs)

    # the mini-batch

    def windows(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of the loader, those of a mini-batch after its `prepare_mini_batch`.

        What an epoch leaves over is the beginning of the next epoch's first mini-batch, as in OpenRLHF.
        """
        for micro in loader:
            self._given.append(micro)
            if len(self._given) == max(1, int(self.strategy.accumulated_gradient)):
                given, self._given = self._given, []
                yield from self.window(given)

    def window(self, given: list[Any]) -> Iterator[Any]:
        """One mini-batch."""
        self.stack.begin_step(self.done, self.total_steps, int(self.args.train.seed))
        self.done += 1
        if self.stack.claims("reference_policy") and self.stack.reference_policy() == "current":
            self.renew_reference()
        window = self.build(given)
        mini = self.stack.pair_mini_batch(window.columns, reduce=self.sum_over_ranks)
        if mini.weightless:
            logger.warning("step %d: no pair counts, the update is skipped", self.done)
            return
        self.stack.metrics.log("pairs/dropped", float(mini.dropped.sum()))
        for micro, rows in zip(window.micros, window.rows, strict=True):
            self._mini, self._rows = mini, rows
            yield micro
        self._mini = None

    def build(self, given: list[Any]) -> Window:
        """The pairs of these micro-batches as the plugins want them, and the columns of their update."""
        pairs = self.pairs_of(given)
        micros, sizes = given, [len(micro[4]) for micro in given]
        if self.stack.claims("build_preferences"):
            built = self.stack.build_preferences(pairs)
            pairs = filled(built if len(built) else weightless(pairs), len(given))
            rows = list(torch.arange(len(pairs)).tensor_split(len(given)))
            micros = [self.micro_of(pairs, part) for part in rows]
        else:
            rows = list(torch.arange(len(pairs)).split(sizes))
        device = next(self.trainer.model.parameters()).device
        columns: dict[str, Column] = {
            name: column.to(device) if isinstance(column, Tensor) else column
            for name, column in self.stack.pair_columns(pairs).items()
        }
        width = pairs.chosen_mask.shape[1]
        if self.references:
            columns |= self.passes(self.trainer.ref_model, "ref_log_probs", micros, width)
        if self.stack.needs_mini_batch_log_probs:
            self.trainer.model.eval()
            columns |= self.passes(self.trainer.model, "log_probs", micros, width)
            self.trainer.model.train()
        return Window(micros, rows, pairs, columns)

    def pairs_of(self, given: Sequence[Any]) -> Pairs:
        """The pairs of some micro-batches, prompt and responses apart."""
        rows = [(micro[0].squeeze(1)[row], micro[1].squeeze(1)[row], micro[2].squeeze(1)[row], micro[3].squeeze(1)[row], start)
                for micro in given for row, start in enumerate(micro[4])]  # fmt: skip
        responses = {
            side: [item[2 * place][int(item[4]) : int(item[2 * place + 1].sum())] for item in rows]
            for place, side in enumerate(SIDES)
        }
        width = max(1, *(len(response) for side in responses.values() for response in side))
        fields: dict[str, Any] = {}
        for side, tokens in responses.items():
            fields[side] = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in tokens])
            fields[f"{side}_mask"] = torch.arange(width) < torch.tensor([len(row) for row in tokens])[:, None]
        places = [item[4].place for item in rows]
        columns = {name: as_column([values[place] for place in places])
                   for name, values in self.dataset.rlplugins_columns.items()}  # fmt: skip
        return Pairs(
            prompt_keys=self.prompts.keys[torch.tensor(places)],
            prompts=[item[0][: int(item[4])].tolist() for item in rows], columns=Columns(columns), **fields,
        )  # fmt: skip

    def micro_of(self, pairs: Pairs, rows: Tensor) -> tuple[Any, ...]:
        """OpenRLHF's micro-batch of some pairs."""
        found: list[Any] = []
        for side in SIDES:
            tokens, mask = getattr(pairs, side), getattr(pairs, f"{side}_mask")
            whole = [[*pairs.prompts[row], *tokens[row][mask[row]].tolist()] for row in rows.tolist()]
            width = max(map(len, whole))
            pad = self.trainer.tokenizer.pad_token_id
            found.append(torch.tensor([[*row, *[pad] * (width - len(row))] for row in whole])[:, None])
            found.append(torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])[:, None])
        return (*found, [len(pairs.prompts[row]) for row in rows.tolist()])

    @torch.no_grad()
    def passes(self, model: Any, name: str, micros: Sequence[Any], width: int) -> dict[str, Tensor]:
        """Log-probs (N, T) of both sides of all pairs under a model."""
        device = next(self.trainer.model.parameters()).device
        parts = []
        for micro in micros:
            tokens = [column.squeeze(1).to(device) for column in micro[:4]]
            self.original_forward(model, *tokens, list(micro[4]))
            parts.append(self.sides(self._log_probs["last"], micro[4], width))
        return {f"{side}_{name}": torch.cat([part[place] for part in parts]) for place, side in enumerate(SIDES)}

    @staticmethod
    def sides(log_probs: Tensor, lengths: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
        """(n, T) of the chosen and the rejected responses from log-probs (2 n, S - 1) of whole sequences."""
        starts = torch.tensor([int(length) for length in lengths] * 2, device=log_probs.device)
        chosen, rejected = to_responses(log_probs, starts, width).chunk(2)
        return chosen, rejected

    def renew_reference(self) -> None:
        """The policy's weights for the reference."""
        with torch.no_grad():
            for old, new in zip(self.trainer.ref_model.parameters(), self.trainer.model.parameters(), strict=True):
                old.copy_(new)

    # in OpenRLHF's loop

    def sums(self, per_token_logps: Tensor, *args: Any, **kwargs: Any) -> Any:
        """OpenRLHF's sums; the log-probs of the tokens are kept."""
        self._log_probs["last"] = per_token_logps
        return self.original_sums(per_token_logps, *args, **kwargs)

    def forward(self, model: Any, chosen_ids: Tensor, *rest: Any) -> Any:
        """OpenRLHF's forward; the reference's is made where the mini-batch is opened, or not at all."""
        if model is self.trainer.ref_model:
            if self.references and self._mini is None:
                result = self.original_forward(model, chosen_ids, *rest)
                self._log_probs["reference"] = self._log_probs.pop("last")
                return result
            nothing = torch.zeros(len(chosen_ids), device=chosen_ids.device)
            return nothing, nothing, 0, nothing.sum()
        result = self.original_forward(model, chosen_ids, *rest)
        self._log_probs["policy"], self._batch = self._log_probs.pop("last"), (chosen_ids, *rest)
        return result

    def loss(self, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The loss that OpenRLHF differentiates and logs, and what the two sides are worth, (n,) each."""
        log_probs = self._log_probs.pop("policy")
        if self._mini is None:
            return self.validation_loss(log_probs)
        lengths = self._batch[4]
        mask = self._mini.column("chosen_mask")
        assert mask is not None
        chosen, rejected = self.sides(log_probs, lengths, mask.shape[1])
        made = self._mini.loss(chosen, rejected, self._rows)
        self.stack.metrics.log("pairs/broken", made.broken.float().sum())
        ranks = torch.distributed.get_world_size(self.group)
        factor = ranks * max(1, int(self.strategy.accumulated_gradient))  # DeepSpeed averages over these
        return (made.total * factor, *self.worth(self._mini, self._rows, chosen, rejected))

    def validation_loss(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for pairs of the evaluation, which are as they stand in the data set."""
        chosen_ids, chosen_mask, rejected_ids, rejected_mask, lengths = self._batch
        micro = (chosen_ids, chosen_mask, rejected_ids, rejected_mask, lengths)
        dataset, self.dataset = self.dataset, self.trainer.eval_dataloader.dataset
        try:
            pairs = self.pairs_of([tuple(x.cpu() if isinstance(x, Tensor) else x for x in micro)])
        finally:
            self.dataset = dataset
        width = pairs.chosen_mask.shape[1]
        columns = {name: column.to(log_probs.device) if isinstance(column, Tensor) else column
                   for name, column in self.stack.pair_columns(pairs).items()}  # fmt: skip
        if self.references:
            both = self.sides(self._log_probs.pop("reference"), lengths, width)
            columns |= {f"{side}_ref_log_probs": values for side, values in zip(SIDES, both, strict=True)}
        mini = self.stack.pair_mini_batch(columns, metrics=Metrics())
        chosen, rejected = self.sides(log_probs, lengths, width)
        made: PairLoss = mini.loss(chosen, rejected)
        return (made.preference, *self.worth(mini, torch.arange(len(pairs)), chosen, rejected))

    def worth(self, mini: PairMiniBatch, rows: Tensor, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Implicit rewards (n,): beta times the log-ratio or, without a reference, the mean log-prob."""
        found = []
        for side, values in zip(SIDES, (chosen.detach(), rejected.detach()), strict=True):
            mask, behind = mini.column(f"{side}_mask"), mini.column(f"{side}_ref_log_probs")
            assert mask is not None
            rows = rows.to(mask.device)
            values = values if behind is None else values - behind[rows]
            inside = torch.where(mask[rows], values, 0.0)
            found.append(float(self.args.model.beta) * over_tokens(inside, mask[rows].float(), mean=behind is None))
        return found[0], found[1]

    # ranks, logs, checkpoints

    @property
    def group(self) -> Any:
        """The processes that share a mini-batch."""
        return self.strategy.ds_device_mesh["dp"].get_group()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` added over the ranks."""
        if torch.distributed.get_world_size(self.group) == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def over_ranks(self, metrics: Metrics) -> dict[str, float]:
        """The means of what all ranks logged."""
        everyone: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(everyone, metrics.sums(), group=self.group)
        merged = Metrics()
        for sums in everyone:
            for name, (total, weight) in sums.items():
                if weight:
                    merged.log(name, total / weight, weight)
        return merged.as_dict()

    def save(
        self,
        args: Any,
        global_step: int,
        step_bar: Any,
        logs_dict: Mapping[str, Any] | None = None,
        client_states: Any = None,
    ) -> Any:
        """OpenRLHF's logs with the stack's, and its checkpoint, the stack's part first."""
        logs = {**(logs_dict or {}), **self.over_ranks(self.stack.metrics)}
        if global_step % args.ckpt.save_steps == 0 and not self.trainer.disable_ds_ckpt and self.strategy.is_rank_0():
            self.save_state(global_step)
        step_bar.set_postfix(logs)
        return self.original_save(args, global_step, step_bar, logs, client_states)

    def state_folder(self, step: int) -> Path:
        """Where the stack's part of a checkpoint lies: beside OpenRLHF's, which counts the folders in its own."""
        path = Path(self.args.ckpt.path)
        return path.with_name(f"{path.name}_rlplugins") / f"global_step{step}"

    def save_state(self, step: int) -> None:
        """Write the plugins' state, and a reference that is renewed; remove those of checkpoints that are gone."""
        folder = self.state_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        self.stack.save(folder / "plugins", step)
        if self.stack.claims("reference_policy"):
            weights = enumerate(self.trainer.ref_model.parameters())
            save_file({str(place): value.detach().cpu().contiguous() for place, value in weights}, folder / REFERENCE)
        for other in folder.parent.iterdir():
            if other != folder and not (Path(self.args.ckpt.path) / other.name).exists():
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> None:
        """The stack's part of the checkpoint that OpenRLHF goes on from."""
        folder = self.state_folder(self.done)
        if not folder.exists():
            logger.warning("%s is missing: the plugins start anew from this checkpoint", folder)
            return
        self.stack.load(folder / "plugins")
        if (folder / REFERENCE).exists():
            saved = load_file(folder / REFERENCE)
            with torch.no_grad():
                for place, value in enumerate(self.trainer.ref_model.parameters()):
                    value.copy_(saved[str(place)])


class Loader:
    """A loader that is read one mini-batch ahead; all else is as the loader's own."""

    def __init__(self, loader: Any, run: DpoRun) -> None:
        self._loader = loader
        self._run = run

    def __iter__(self) -> Iterator[Any]:
        return self._run.windows(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def weightless(pairs: Pairs) -> Pairs:
    """The pairs with weight 0, where the plugins have left none."""
    return filled(pairs.select(torch.arange(1)), 1, torch.zeros(1, 1))


def filled(pairs: Pairs, least: int, weights: Tensor | None = None) -> Pairs:
    """The pairs and, up to `least`, copies of the first with weight 0."""
    more = max(0, least - len(pairs))
    given = pairs.weights if weights is None else weights
    if not more and given is None:
        return pairs
    given = torch.ones(len(pairs), 1) if given is None else given
    index = torch.cat([torch.arange(len(pairs)), torch.zeros(more, dtype=torch.int64)])
    made = pairs.select(index)
    made.weights = torch.cat([given, torch.zeros(more, 1)])
    return made
