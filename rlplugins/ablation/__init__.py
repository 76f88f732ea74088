"""Ablations: train several stacks with several seeds, side by side, and compare them."""

from rlplugins.ablation.ablate import run_study
from rlplugins.ablation.launch import train_command
from rlplugins.ablation.study import Cell, Study, StudyError, load_study

__all__ = ["Cell", "Study", "StudyError", "load_study", "run_study", "train_command"]
