"""Settings of the scorers that are functions of the user's."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, PositiveFloat, PositiveInt

from rayhf.config.scorers import PairwiseEntryConfig, PointwiseEntryConfig, ScorerEntryConfig

_FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_function(function: str) -> str:
    """Return a function's name in the form module:function. Raises ValueError for another one."""
    if _FUNCTION.fullmatch(function):
        return function
    dotted = function.replace(".py:", ":").replace("/", ".")
    module, _, name = dotted.rpartition(":" if ":" in function else ".")
    guess = f"{module.strip('.')}:{name}"
    hint = f"; did you mean {guess}?" if _FUNCTION.fullmatch(guess) else ""
    raise ValueError(f"{function!r} is not of the form module:function{hint}")


class FunctionEntryConfig(ScorerEntryConfig):
    """Settings of a function that runs in processes of its own."""

    function: Annotated[str, AfterValidator(check_function)]
    """module:function."""
    workers: PositiveInt = 1
    """Number of processes that call it."""
    concurrency: PositiveInt = 16
    """Calls in flight in one process, of an `async def` function."""
    timeout_s: PositiveFloat = 10.0
    """Limit on one call, in seconds."""
    import_timeout_s: PositiveFloat = 60.0
    """Limit on importing its module, in seconds."""
    network: bool = False
    """The function calls a service. Otherwise its process has no network where the kernel allows
    that."""

    @property
    def default_name(self) -> str:
        """Name where the config gives none: the function's."""
        return self.function.rpartition(":")[2]

    @property
    def is_concurrent(self) -> bool:
        """Whether several calls may run at the same time."""
        return True


class RuleConfig(FunctionEntryConfig, PointwiseEntryConfig):
    """A function `module:function` that scores completions; its parameters are read by name."""

    type: str = "rule"
    style: Literal["rayhf", "trl", "verl"] | None = None
    """Whose reward functions it is like. Default: trl where it has a parameter `completions`, verl
    where it has `solution_str`, otherwise rayhf."""
    batch: PositiveInt = 32
    """Maximum number of completions in one call (style trl)."""
    conversational: bool | None = None
    """Prompts and completions are lists of messages (style trl). Default: where the row's are."""


class PairwiseRuleConfig(FunctionEntryConfig, PairwiseEntryConfig):
    """A function `module:function(first, second, *, prompt, reference_answer) -> float`.

    It returns the probability that first is better. It is called once for each two completions of a
    prompt, the earlier one first; the other direction is one minus that.
    """

    type: str = "pairwise_rule"
