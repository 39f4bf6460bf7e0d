"""Every error that rayhf raises on purpose. Each is picklable, says what it got, and knows its exit
code and a remedy.

RayhfError                      1   anything below, for `except` at the command line
├── ConfigError                 2   a key, a file or a row of the user's input is refused before
                                anything starts
├── PlacementError              2   the cluster does not have what the config asks for
├── LockedError                 4   another launcher is writing this run directory
│   └── FencedError             4   a later attempt owns the run directory: this one may not write
    any more
├── CheckpointError             5   no valid checkpoint, or one that does not match
├── SecurityError               6   a cluster that asks nobody for a token, or a secret where others
                                can read it
├── NumericalError              7   a non-finite loss, gradient or weight
├── WeightSyncError             7   an engine does not hold the learner's weights
│   └── StaleWeightsError       7   an engine was asked to write with a version it does not hold
├── StorageError                8   the run directory cannot be written
├── ScorerError                 9   too many completions could not be scored
├── ActorLostError             10   an actor's process died, again and again
├── DeadlineError              11   a wait passed its limit; says which phase waited for whom and
                               how long
├── PausedError                12   a guard paused the campaign; `rayhf unpause` lets it go on
├── ServiceError               13   a gRPC service refused a call
│   └── UnreachableError       13   it did not answer: it is down, too slow, or too busy
└── InterruptedRunError        75   told to stop (SIGTERM, Ctrl-C, `rayhf stop`); the same command
                               continues
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import ClassVar


class RayhfError(Exception):
    """Base of all deliberate errors. `str(error)` is one readable line; the class decides the exit
    code."""

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "something that rayhf did not foresee"
    remedy: ClassVar[str] = "`rayhf --debug ...` shows where; please report it"


class ConfigError(RayhfError):
    """Refused input. The message names where (key, file or row), what was found and what was
    expected."""

    exit_code = 2
    meaning = "a key, a file or a row of the input was refused before anything started"
    remedy = "correct what the message names"


class PlacementError(RayhfError):
    exit_code = 2
    meaning = "the cluster does not have what the config asks for"
    remedy = "ask for less in `cluster`, `rollout`, `learner`, or add nodes"


class LockedError(RayhfError):
    exit_code = 4
    meaning = "another process is running this campaign"
    remedy = "let it, or end the process that the message names"


class FencedError(LockedError):
    meaning = "a later attempt owns the run directory; nothing was written"
    remedy = "nothing: the later attempt goes on"


class CheckpointError(RayhfError):
    exit_code = 5
    meaning = "no checkpoint is valid, or the run directory is not what was committed"
    remedy = "`rayhf verify RUN` names the files; bring them back from a copy, or start in another run.dir"


class SecurityError(RayhfError):
    exit_code = 6
    meaning = "the cluster lets anybody in, or a secret would be where others can read it; nothing was sent"
    remedy = "start the cluster with RAY_AUTH_MODE=token, keep the token in a file of mode 600 (docs/security.md)"


class NumericalError(RayhfError):
    exit_code = 7
    meaning = "a loss, a gradient or a weight was not finite; the last commit is"
    remedy = (
        "lower learner.lr, look at the last rounds' metrics and samples; the same command continues"
    )


class WeightSyncError(RayhfError):
    exit_code = 7
    meaning = "an engine does not hold the learner's weights"
    remedy = "the same command continues with new engines; if it comes again, please report it"


class StaleWeightsError(WeightSyncError):
    meaning = "an engine was asked to write with weights that it does not hold"


class StorageError(RayhfError):
    exit_code = 8
    meaning = "the run directory cannot be written; the last commit is whole"
    remedy = "free space or mend the permissions; the same command continues"


class ScorerError(RayhfError):
    exit_code = 9
    meaning = "too many completions could not be scored, and none was trained on; or a served scorer is broken"
    remedy = "mend the scorer that the message names; the same command continues"


class ActorLostError(RayhfError):
    exit_code = 10
    meaning = "an actor was lost more often than run.restarts allows"
    remedy = (
        "look for memory in the message and in logs/attempt-*/stacks; the same command continues"
    )


class DeadlineError(RayhfError):
    exit_code = 11
    meaning = "a wait passed its limit more often than run.restarts allows"
    remedy = (
        "logs/attempt-*/stacks shows who hung where; raise run.timeout_s if the work is only slow"
    )


class PausedError(RayhfError):
    exit_code = 12
    meaning = "a guard found the campaign unhealthy; the last healthy commit is the newest"
    remedy = "change the config as the message says, or `rayhf unpause RUN`, then the same command"


class ServiceError(RayhfError):
    exit_code = 13
    meaning = "a gRPC service refused a call, or could not be reached"
    remedy = (
        "the message names the service: is it up, does it know this certificate and this token?"
    )


class UnreachableError(ServiceError):
    """Asking again may help."""

    meaning = "a gRPC service did not answer"


class InterruptedRunError(RayhfError):
    exit_code = 75
    meaning = "told to stop"
    remedy = "the same command continues"


def did_you_mean(word: str, valid: Collection[str]) -> str:
    """Return "; did you mean X?" for the valid word nearest to `word`, "" if none is near."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def nearest(word: str, valid: Collection[str]) -> str:
    """Return the end of a message that refuses `word`: the nearest valid word, or else all."""
    return did_you_mean(word, valid) or (f"; valid: {', '.join(valid)}" if valid else "")
