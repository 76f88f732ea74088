"""Small rollouts and shortcuts for testing a plugin without a trainer, and the conformance kit."""

from rlplugins.testing.conformance import Conformance, conformance
from rlplugins.testing.rows import credit, loss_and_gradient, make_pool, make_rollouts, stand_in, start

__all__ = [
    "Conformance", "conformance", "credit", "loss_and_gradient", "make_pool", "make_rollouts", "stand_in", "start",
]  # fmt: skip
