"""What `rlplugins doctor` says about this machine's local trainer."""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import version

import torch


def report() -> tuple[str, bool]:
    """Versions, device, and a check of generation and log-probs against transformers' own."""
    lines = [f"python {platform.python_version()}", f"device {_device()}"]
    lines += [f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")]
    problem = _canary()
    lines.append(problem or "generation and log-probs agree with transformers")
    return "\n".join(lines), problem is None


def _device() -> str:
    if not torch.cuda.is_available():
        return f"cpu, {torch.get_num_threads()} thread(s)"
    return f"cuda: {torch.cuda.get_device_name()}"


def _canary() -> str | None:
    """Greedy tokens and their log-probs on a tiny random model; what differs, or None."""
    from rlplugins.rollouts import Sampling
    from rlplugins_local.policy import Policy, Sequences

    try:
        with warnings.catch_warnings(action="ignore"):
            policy = Policy(_tiny_model(), None, torch.device("cpu"))
            prompts = [[3, 4, 5], [6, 7]]
            drawn = policy.generate(prompts, [[], []], Sampling.of(2, 1.0, 5), 0, greedy=True)
            sequences = Sequences.of(prompts, drawn.responses, drawn.mask)
            ours = policy.passes(sequences, 1.0, None).log_probs
            for row, prompt in enumerate(prompts):
                tokens = policy.model.generate(
                    torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0
                )
                if tokens[0, len(prompt) :].tolist() != drawn.responses[row].tolist():
                    return "PROBLEM: generation differs from that of transformers: this version is not supported"
                logits = policy.model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                theirs = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
                if not torch.allclose(ours[row], theirs, atol=1e-4):
                    return "PROBLEM: log-probs differ from those of transformers: this version is not supported"
    except Exception as error:
        return f"PROBLEM: transformers {version('transformers')} does not work with the local trainer: {error!r}"
    return None


def _tiny_model() -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()
