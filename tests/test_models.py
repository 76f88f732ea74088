"""Models of a plugin's own: what they predict, how they learn, and that they are saved and go on exactly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlplugins import Plugin, Prompts, Run, Stack, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError, StateError
from rlplugins.models import LanguageModel, LinearModel, text_of
from rlplugins.rollouts import POLICY, Rollouts
from rlplugins.stack import StackConfig
from rlplugins.steps import Step
from rlplugins.testing import conformance, make_pool, make_rollouts, start
from rlplugins.testing.conformance import NonConforming, Skip
from rlplugins.testing.conformance import run as run_check
from rlplugins.testing.tiny import make_tokenizer
from rlplugins_local import arithmetic, train
from rlplugins_local.config import TrainConfig

PROMPTS = ["What is 1 + 2?", "Prove it.", "x", "A longer prompt than all of the others, by far."]
TARGETS = torch.tensor([1.0, 0.0, 0.25, 0.75])
FEW = settings(max_examples=25, deadline=None)


def numbers(*items: float) -> Tensor:
    return torch.tensor(items, dtype=torch.float64)


# the linear model

PHI = torch.tensor([[1.0, 0.2], [0.4, -0.5], [-0.3, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("head", "predicted", "loss", "w", "b"),
    [
        ("linear", [0.51, 0.59, 0.26], 0.1508, [0.0732, -0.194], 0.464),
        ("sigmoid", [0.62480647, 0.64336515, 0.56463629], 0.15602874, [0.092669012, -0.20425174], 0.44207146),
    ],
)
def test_a_step_of_the_linear_model(head: Any, predicted: list[float], loss: float, w: list[float], b: float) -> None:
    model = LinearModel(2, learning_rate=0.05, head=head)
    model.load_state_dict({"w": numbers(0.1, -0.2), "b": numbers(0.45)[0]})
    assert model.predict(PHI).tolist() == pytest.approx(predicted, abs=1e-8)
    assert model.fit(PHI, numbers(0.25, 0.75, 0.5)) == pytest.approx(loss, abs=1e-8)
    assert model.w.tolist() == pytest.approx(w, abs=1e-8) and float(model.b) == pytest.approx(b, abs=1e-8)


@FEW
@given(st.integers(0, 4), st.integers(0, 5), st.sampled_from(["linear", "sigmoid"]), st.integers(0, 99))
def test_a_step_of_the_linear_model_goes_down_the_gradient(d: int, K: int, head: Any, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    phi, R = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((K, d), (K,)))
    w, b = torch.randn(d, generator=source, dtype=torch.float64), numbers(0.3)[0]
    model = LinearModel(d, learning_rate=0.1, head=head)
    model.load_state_dict({"w": w, "b": b})
    V = phi @ w + b
    V = V.sigmoid() if head == "sigmoid" else V
    error = 2 * (V - R) * (V * (1 - V) if head == "sigmoid" else 1)
    assert model.fit(phi, R) == pytest.approx(float((V - R).square().sum()))
    torch.testing.assert_close(model.w, w - 0.1 * error @ phi)
    torch.testing.assert_close(model.b, b - 0.1 * error.sum())


@pytest.mark.parametrize(("head", "begin"), [("linear", 0.3), ("linear", -7.0), ("sigmoid", 0.3), ("sigmoid", 0.999)])
def test_the_linear_model_starts_where_it_should(head: Any, begin: float) -> None:
    model = LinearModel(2, learning_rate=0.1, head=head, start=begin)
    assert model.predict(100 * PHI).tolist() == pytest.approx([begin] * 3, abs=1e-15)


def test_the_linear_model_takes_any_numbers_and_keeps_its_own() -> None:
    model = LinearModel(2, learning_rate=0.1)
    assert model.fit(PHI.float(), torch.tensor([1, 0, 1])) == 2
    kept = copy.deepcopy(model.state_dict())
    assert model.predict(PHI.float()).dtype == torch.float64
    assert torch.equal(model.w, kept["w"]) and torch.equal(model.b, kept["b"])
    with torch.no_grad():  # as the hooks of a trainer may run
        model.fit(PHI, TARGETS[:3])
    assert not torch.equal(model.w, kept["w"])


@pytest.mark.parametrize("target", [float("nan"), float("inf")])
def test_a_step_that_would_spoil_the_linear_model_is_left_out(target: float) -> None:
    model = LinearModel(2, learning_rate=0.1)
    model.fit(PHI, numbers(1.0, target, 0.0))
    assert not model.w.any() and not model.b


def test_the_state_of_a_linear_model_with_other_features_is_refused() -> None:
    with pytest.raises(StateError, match="has 3 features, this one 2"):
        LinearModel(2, learning_rate=0.1).load_state_dict(LinearModel(3, learning_rate=0.1).state_dict())


@pytest.mark.parametrize("begin", [0.0, 1.0, -0.5, 2.0])
def test_a_sigmoid_cannot_start_everywhere(begin: float, folder: Callable[[str], Path]) -> None:
    for make in (
        lambda: LinearModel(2, learning_rate=0.1, head="sigmoid", start=begin),
        lambda: LanguageModel(folder("bert"), learning_rate=0.1, head="sigmoid", start=begin),
    ):
        with pytest.raises(ConfigurationError, match=f"between 0 and 1, it cannot start at {begin}"):
            make()


# the language model

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
KINDS = ["qwen2", "llama", "bert", "t5"]


def hugging_face_model(kind: str, words: int) -> Any:
    """An untrained model: two causal ones with a head for words, an encoder with dropout, one of both parts."""
    import transformers

    torch.manual_seed(7)
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=words, **SHAPE))
    if kind == "t5":
        size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=words, **size))
    config, model = (
        (transformers.LlamaConfig, transformers.LlamaForCausalLM)
        if kind == "llama"
        else (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)
    )
    return model(config(vocab_size=words, num_key_value_heads=1, **SHAPE))


def tokenizer_with_start() -> Any:
    """One that begins every text with a token of its own, as most do."""
    from tokenizers.processors import TemplateProcessing

    made = make_tokenizer()
    begin = made.convert_tokens_to_ids("<|start|>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", begin)]
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tokenizer = tokenizer_with_start()
            hugging_face_model(kind, len(tokenizer)).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(params=KINDS)
def language_model(request: pytest.FixtureRequest, folder: Callable[[str], Path]) -> Callable[..., LanguageModel]:
    return lambda **options: LanguageModel(folder(request.param), **{"learning_rate": 1e-3, **options})


def frozen(model: Any) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other)


@pytest.mark.parametrize(("head", "begin"), [("linear", 0.3), ("linear", -7.0), ("sigmoid", 0.3)])
def test_a_language_model_starts_where_it_should(
    language_model: Callable[..., LanguageModel], head: str, begin: float
) -> None:
    predicted = language_model(head=head, start=begin).predict(PROMPTS)
    assert predicted.dtype == torch.float64 and bool((predicted == predicted[0]).all())
    assert float(predicted[0]) == pytest.approx(begin, abs=1e-7)


def test_a_prediction_changes_nothing(language_model: Callable[..., LanguageModel]) -> None:
    model = language_model()
    model.fit(PROMPTS, TARGETS)
    before, random = frozen(model), torch.get_rng_state()
    first = model.predict(PROMPTS)
    assert torch.equal(model.predict(PROMPTS), first) and not first.requires_grad
    assert same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_language_model_leaves_the_random_numbers_of_the_run_alone(
    language_model: Callable[..., LanguageModel],
) -> None:
    before = torch.get_rng_state()
    language_model().fit(PROMPTS, TARGETS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("head", ["linear", "sigmoid"])
def test_a_step_is_that_of_adamw_on_the_sum_of_squares(language_model: Callable[..., LanguageModel], head: str) -> None:
    model = language_model(head=head, start=0.4, learning_rate=1e-2)
    model.module.double()  # in float32 rounding would decide where a gradient is 0
    model.fit(PROMPTS, TARGETS)  # now the head is not 0, and the body gets a gradient
    hand = copy.deepcopy(model.module)
    optimiser = torch.optim.AdamW(hand.parameters(), lr=1e-2, weight_decay=0.0)
    moments = copy.deepcopy(model.optimiser.state_dict())["state"]
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    loss = torch.zeros((), dtype=torch.float64)
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):  # one by one: no padding
        ids = torch.tensor([model.tokenizer(prompt).input_ids])
        value = hand["score"](hand["body"](input_ids=ids).last_hidden_state[0, -1])[0]
        loss = loss + ((value.sigmoid() if head == "sigmoid" else value) - target).square()
    loss.backward()
    assert model.fit(PROMPTS, TARGETS) == pytest.approx(float(loss.detach()), rel=1e-6)
    moved = sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in hand.parameters())
    optimiser.step()
    for (name, expected), found in zip(hand.named_parameters(), model.module.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert moved > 5, "the body learns too"


def test_the_number_of_prompts_in_a_pass_makes_no_difference(language_model: Callable[..., LanguageModel]) -> None:
    whole, parts = language_model(start=0.5), language_model(start=0.5, batch_size=3)
    for _ in range(3):
        assert whole.fit(PROMPTS, TARGETS) == pytest.approx(parts.fit(PROMPTS, TARGETS), rel=1e-3)
        torch.testing.assert_close(parts.predict(PROMPTS), whole.predict(PROMPTS), rtol=1e-3, atol=1e-4)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        whole.predict([PROMPTS[place] for place in order]), whole.predict(PROMPTS)[order], rtol=1e-4, atol=1e-5
    )


def test_a_language_model_learns(language_model: Callable[..., LanguageModel]) -> None:
    model = language_model(learning_rate=3e-3, start=0.5)
    losses = [model.fit(PROMPTS, TARGETS) for _ in range(60)]
    assert losses[0] == pytest.approx(float((TARGETS - 0.5).square().sum())) and losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("target", [float("nan"), float("inf")])
def test_a_step_that_would_spoil_the_language_model_is_left_out(folder: Callable[[str], Path], target: float) -> None:
    model = LanguageModel(folder("llama"), learning_rate=0.1)
    model.fit(PROMPTS, TARGETS)
    before = frozen(model)
    model.fit(PROMPTS, torch.tensor([1.0, target, 0.0, 0.0]))
    assert same(model.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_without_prompts_nothing_happens(folder: Callable[[str], Path]) -> None:
    model = LanguageModel(folder("llama"), learning_rate=0.1)
    model.fit(PROMPTS, TARGETS)
    before = frozen(model)
    assert model.predict([]).shape == (0,) and model.fit([], torch.zeros(0)) == 0
    assert same(model.state_dict(), before)


# what it reads

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2?"}]


def test_a_chat_is_read_through_its_template(folder: Callable[[str], Path]) -> None:
    model = LanguageModel(folder("qwen2"), learning_rate=0.1)
    text = "<|start|>system Be brief.<|end|><|start|>user 1 + 2?<|end|><|start|>assistant "
    assert model._encoded(CHAT) == model.tokenizer(text, add_special_tokens=False).input_ids
    assert model._encoded("1 + 2?") == model.tokenizer("<|start|>1 + 2?", add_special_tokens=False).input_ids
    model.tokenizer.chat_template = None
    assert model._encoded(CHAT) == model.tokenizer("Be brief.\n1 + 2?").input_ids
    assert text_of(CHAT) == "Be brief.\n1 + 2?" and text_of("x") == "x"


def test_of_a_long_prompt_the_end_is_read(language_model: Callable[..., LanguageModel]) -> None:
    model = language_model(max_tokens=8, start=0.5, learning_rate=1e-2)
    assert model.max_tokens == 8
    model.fit(PROMPTS, TARGETS)
    one, other, shorter, different = model.predict(["a" * 90 + "12345678", "b" * 30 + "12345678", "2345678", "c" * 98])
    assert one == other and one != shorter and one != different


def test_a_prompt_is_cut_to_what_the_model_can_read(language_model: Callable[..., LanguageModel]) -> None:
    model = language_model()
    assert model.max_tokens in (64, 1024)  # T5 knows no longest prompt
    assert bool(model.predict(["y" * 500, "x"]).isfinite().all())
    model.tokenizer = make_tokenizer()  # without a token at the start nothing is left of an empty prompt
    assert bool(model.predict([""]).isfinite().all())


def test_the_tokenizer_may_know_a_shorter_limit(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = LanguageModel(folder("bert"), learning_rate=0.1)
    model.module["body"].save_pretrained(tmp_path)
    model.tokenizer.model_max_length = 40
    model.tokenizer.save_pretrained(tmp_path)
    assert LanguageModel(tmp_path, learning_rate=0.1).max_tokens == 40


# what goes wrong


def test_a_folder_without_a_model_or_a_tokenizer_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigurationError, match=f"{place} holds no model"):
            LanguageModel(place, learning_rate=0.1)
    hugging_face_model("llama", 20).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=f"{tmp_path} holds no model of texts with its tokenizer"):
        LanguageModel(tmp_path, learning_rate=0.1)


def test_a_model_of_something_else_than_texts_is_named(tmp_path: Path) -> None:
    import transformers

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **size)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="holds no model of texts"):
        LanguageModel(tmp_path, learning_rate=0.1)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_wrong_device_is_named(folder: Callable[[str], Path], device: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device '{device}' cannot be used here"):
        LanguageModel(folder("llama"), learning_rate=0.1, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_gpu_gives_what_the_cpu_gives(language_model: Callable[..., LanguageModel]) -> None:
    slow, fast = language_model(start=0.5), language_model(start=0.5, device="cuda")
    for _ in range(2):
        assert fast.fit(PROMPTS, TARGETS) == pytest.approx(slow.fit(PROMPTS, TARGETS), rel=1e-3)
        torch.testing.assert_close(fast.predict(PROMPTS), slow.predict(PROMPTS), rtol=1e-3, atol=1e-3)


# what is remembered


def test_a_copy_goes_on_to_the_last_digit_and_shares_nothing(language_model: Callable[..., LanguageModel]) -> None:
    model, other = language_model(), language_model()
    model.fit(PROMPTS, TARGETS)
    other.load_state_dict(model.state_dict())
    assert same(other.state_dict(), model.state_dict())
    before = frozen(model)
    other.fit(PROMPTS, TARGETS)
    assert same(model.state_dict(), before) and not same(other.state_dict(), before)
    model.fit(PROMPTS, TARGETS)
    assert same(other.state_dict(), model.state_dict())


def test_the_state_of_another_language_model_is_refused(folder: Callable[[str], Path]) -> None:
    one, other = (LanguageModel(folder(kind), learning_rate=0.1) for kind in ("llama", "bert"))
    with pytest.raises(StateError, match=r"the saved language model is another one.*body\."):
        one.load_state_dict(other.state_dict())


class Owner(Plugin):
    """Takes the prompts of which a model of its own expects most (made for a test; arXiv 2501.00001)."""

    name = "owner"
    needs = (needs.TRAINABLE_MODEL,)

    folder: str = ""
    """Folder of a language model; a linear one if empty."""

    def init_state(self, run: Run) -> dict[str, Any]:
        linear = LinearModel(1, learning_rate=0.05, start=0.5)
        return {"V": LanguageModel(self.folder, learning_rate=1e-3) if self.folder else linear, "steps": 0}

    def read(self, prompts: Prompts) -> Any:
        return prompts.texts if self.folder else torch.tensor([[float(len(str(text)) % 3)] for text in prompts.texts])

    @hookimpl
    def choose_prompts(self, prompts: Prompts, count: int, step: Step) -> Tensor:
        order = torch.argsort(self.state.V.predict(self.read(prompts)), descending=True, stable=True)[:count]
        step.keep("chosen", prompts.select(order))
        return order

    @hookimpl
    def on_step_end(self, scores: Tensor, rollouts: Rollouts, step: Step) -> None:
        chosen: Prompts | None = step.kept.get("chosen")
        if chosen is None:
            return
        place = torch.where(rollouts.of_kind(POLICY), chosen.positions(rollouts.prompt_rows), -1)
        means = torch.full((len(chosen) + 1, 1), torch.nan)
        means[place] = ops.group_mean(scores.nan_to_num(), place)
        known = means[:-1, 0].isfinite()
        self.state.V.fit(self.read(chosen.select(known.nonzero().flatten())), means[:-1, 0][known])
        self.state.steps += 1


class FitsTooOften(Owner):
    """Makes a step in a hook that may be called twice (made for a test; arXiv 2501.00001)."""

    name = "fits-too-often"

    @hookimpl
    def prompt_weights(self, prompts: Prompts) -> Tensor:
        self.state.V.fit(self.read(prompts), torch.ones(len(prompts)))
        return self.state.V.predict(self.read(prompts)).clamp(min=0.1)

    @hookimpl
    def choose_prompts(self, prompts: Prompts, prompt_weights: Tensor, count: int, step: Step) -> Tensor:
        step.keep("chosen", prompts.select(torch.arange(count)))
        return torch.arange(count)


class Forgets(Owner):
    """Keeps its model where nobody saves it (made for a test; arXiv 2501.00001)."""

    name = "forgets"

    def init_state(self, run: Run) -> dict[str, Any]:
        object.__setattr__(self, "model", super().init_state(run)["V"])
        return {"steps": 0}

    @hookimpl
    def choose_prompts(self, prompts: Prompts, count: int, step: Step) -> Tensor:
        step.keep("chosen", prompts.select(torch.arange(count)))
        self.model.fit(self.read(prompts), torch.ones(len(prompts)))
        return torch.argsort(self.model.predict(self.read(prompts)) * (-1) ** self.state.steps, stable=True)[:count]

    @hookimpl
    def on_step_end(self, scores: Tensor) -> None:
        self.state.steps += int(self.model.b > 0.55)


test_conformance = conformance(Owner)


def test_conformance_with_a_language_model(folder: Callable[[str], Path]) -> None:
    ran = set()
    for name, check, subject in conformance(Owner, [{"folder": str(folder("llama"))}]).tests():
        try:
            run_check(check, subject)
            ran.add(name.partition("[")[0])
        except Skip:
            continue
    assert {"hooks", "determinism", "inputs_unchanged", "permutation", "state"} <= ran


@pytest.mark.parametrize(
    ("plugin", "name", "message"),
    [(FitsTooOften, "determinism", "called a second time: prompt_weights"), (Forgets, "state", "after a restart")],
)
def test_the_kit_finds_a_model_that_is_used_wrongly(plugin: type[Plugin], name: str, message: str) -> None:
    check, subject = next((check, subject) for _, check, subject in conformance(plugin).tests() if check.name == name)
    with pytest.raises(NonConforming, match=message):
        run_check(check, subject)


def owning(folder: str = "") -> tuple[Stack, Prompts]:
    pool = make_pool(6)
    return start([Owner(folder=folder)], pool=pool), pool


def take_steps(stack: Stack, pool: Prompts, steps: range) -> None:
    for number in steps:
        stack.begin_step(number, 10)
        chosen = stack.choose_prompts(pool, 4)
        stack.end_step(make_rollouts([1.0, 0.0, float(number % 2), 1.0], chosen, pool=pool), None)


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_a_saved_model_goes_on_to_the_last_digit(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    place = str(folder(kind)) if kind else ""
    (whole, pool), (first, one), (second, two) = (owning(place) for _ in range(3))
    take_steps(whole, pool, range(4))
    take_steps(first, one, range(2))
    first.save(tmp_path / "state", 2)
    fresh = second.plugins[0].state.V
    assert second.load(tmp_path / "state") == 2
    assert second.plugins[0].state.V is fresh and second.plugins[0].state.steps == 2
    take_steps(second, two, range(2, 4))
    assert same(second.plugins[0].state.V.state_dict(), whole.plugins[0].state.V.state_dict())
    assert not same(first.plugins[0].state.V.state_dict(), whole.plugins[0].state.V.state_dict())


class Holds(Plugin):
    """Holds what it is given."""

    name = "holds"
    features: int = 1
    nested: bool = False

    def init_state(self, run: Run) -> dict[str, Any]:
        model = LinearModel(self.features, learning_rate=0.1)
        return {"V": {"inner": [model]} if self.nested else model, "head": nn.Linear(2, self.features)}

    @hookimpl
    def on_step_end(self) -> None:
        pass


def test_anything_that_can_say_what_it_remembers_can_be_kept(tmp_path: Path) -> None:
    one, other = start([Holds()]), start([Holds()])
    one.save(tmp_path / "state", 1)
    other.load(tmp_path / "state")
    assert torch.equal(other.plugins[0].state.head.weight, one.plugins[0].state.head.weight)


def test_a_saved_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    start([Holds(features=3)]).save(tmp_path / "state", 1)
    with pytest.raises(StateError, match=r"the saved V of holds does not fit this run's.*3 features, this one 1"):
        start([Holds()]).load(tmp_path / "state")


def test_a_model_inside_of_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"state holds\.V\.inner\.0: a LinearModel.*a name of its own"):
        start([Holds(nested=True)]).save(tmp_path / "state", 1)


# a run

SCRIPT = """
import json, sys
from rlplugins.stack import StackConfig
from rlplugins_local import train
from rlplugins_local.config import TrainConfig

config, stack = json.loads(sys.argv[1])
train(TrainConfig.model_validate(config), StackConfig.model_validate(stack), progress=False)
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    lines = [{"prompt": "1" * size + "+2=", "level": size} for size in range(1, 13)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "rewards.py").write_text("def even(prompt, response):\n    return response[:1] in tuple('02468')\n")
    return lambda output, **settings: TrainConfig.model_validate(
        {"model": tmp_path / "model", "data": tmp_path / "prompts.jsonl", "reward": f"{tmp_path}/rewards.py:even",
         "batch_size": 16, "group_size": 4, "max_new_tokens": 3, "learning_rate": 1e-3, "threads": 1, "seed": 3,
         "report_to": ["none"], "output": tmp_path / output, **settings}
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "folder"])
def test_a_resumed_run_continues_to_the_last_digit(kind: str, config: Callable[..., TrainConfig]) -> None:
    own = {"features": ["level"]} if kind == "linear" else {"model": str(config("").model), "learning_rate": 1e-3}
    stack = StackConfig(plugins=[{"pcl": own}])
    whole, resumed = config("whole", steps=4), config("resumed", steps=2)
    train(whole, stack, progress=False)
    train(resumed, stack, progress=False)
    again = resumed.model_copy(update={"steps": 4, "resume": True})
    arguments = json.dumps([again.model_dump(mode="json"), stack.model_dump(mode="json")])
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", SCRIPT, arguments], env=environment, timeout=120, check=True)
    metrics = (whole.output / "metrics.jsonl").read_text()
    assert (again.output / "metrics.jsonl").read_text() == metrics and "rlplugins/pcl/value_error" in metrics
    for name in ("plugins/state.safetensors", "plugins/state.json", "model.safetensors"):
        ours, theirs = (run.output / "checkpoint-4" / name for run in (whole, again))
        assert ours.read_bytes() == theirs.read_bytes(), name
