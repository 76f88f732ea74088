"""The local trainer: one process, any Hugging Face causal language model, every hook of rlplugins."""

from rlplugins_local.adapter import adapter, train

__all__ = ["adapter", "train"]
