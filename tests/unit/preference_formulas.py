"""The preference losses as their papers write them, in plain float64 Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class P:
    """One pair as plain numbers: sums of policy and reference, lengths, and the knobs."""

    w: float
    l: float  # noqa: E741
    rw: float
    rl: float
    nw: int
    nl: int
    beta: float
    eps: float
    gamma: float
    tau: float

    @property
    def u(self) -> float:
        """beta * log of (pi_w / ref_w) / (pi_l / ref_l)."""
        return self.beta * ((self.w - self.l) - (self.rw - self.rl))


def prob(z: float) -> float:
    """P(win) from its odds: e^z / (1 + e^z)."""
    return math.exp(z) / (1.0 + math.exp(z))


def odds_of_mean(total: float, length: int) -> float:
    p = math.exp(total / length)
    return p / (1.0 - p)


def exo_expected(p: P) -> float:
    model, label = (prob(p.u), 1 - prob(p.u)), (1 - p.eps, p.eps)
    return sum(q * math.log(q / y) for q, y in zip(model, label, strict=True))


def nca_expected(p: P) -> float:
    chosen, rejected = prob(p.beta * (p.w - p.rw)), prob(p.beta * (p.l - p.rl))
    return -math.log(chosen * math.sqrt(1 - chosen) * math.sqrt(1 - rejected))


def discopop_expected(p: P) -> float:
    mixture = prob(p.u / p.tau)
    return (1 - mixture) * math.log(1 + math.exp(-p.u)) + mixture * math.exp(-p.u)


def orpo_expected(p: P) -> float:
    ratio = odds_of_mean(p.w, p.nw) / odds_of_mean(p.l, p.nl)
    return -p.w / p.nw - p.beta * math.log(ratio / (1 + ratio))


def sppo_expected(p: P) -> float:
    """The paper's form, eta = 1 / beta, divided by eta^2."""
    eta = 1 / p.beta
    return (((p.w - p.rw) - eta * (1 - 0.5)) ** 2 + ((p.l - p.rl) - eta * (0 - 0.5)) ** 2) / eta**2


EXPECTED: dict[str, Callable[[P], float]] = {
    "sigmoid": lambda p: -(1 - p.eps) * math.log(prob(p.u)) - p.eps * math.log(1 - prob(p.u)),
    "robust": lambda p: (
        ((1 - p.eps) * math.log(1 + math.exp(-p.u)) - p.eps * math.log(1 + math.exp(p.u)))
        / (1 - 2 * p.eps)
    ),
    "hinge": lambda p: 0.0 if p.u > 1 else 1 - p.u,
    "ipo": lambda p: (p.u / p.beta - 0.5 / p.beta) ** 2,
    "exo": exo_expected,
    "nca": nca_expected,
    "apo_zero": lambda p: (1 - prob(p.beta * (p.w - p.rw))) + prob(p.beta * (p.l - p.rl)),
    "apo_down": lambda p: prob(p.beta * (p.w - p.rw)) + (1 - prob(p.u)),
    "sppo_hard": sppo_expected,
    "discopop": discopop_expected,
    "simpo": lambda p: math.log(1 + math.exp(p.gamma - p.beta * (p.w / p.nw - p.l / p.nl))),
    "cpo": lambda p: math.log(1 + math.exp(p.beta * (p.l - p.w))) - p.w / p.nw,
    "orpo": orpo_expected,
}
