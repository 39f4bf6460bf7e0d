"""Every error that rayhf raises on purpose. Each is picklable, says what it got, and knows its exit code.

RayhfError                      1   anything below, for `except` at the command line
├── ConfigError                 2   a key, a file or a row of the user's input is refused before anything starts
├── PlacementError              2   the cluster does not have what the config asks for
├── LockedError                 4   another launcher is writing this run directory
│   └── FencedError             4   a later attempt owns the run directory: this one may not write any more
├── CheckpointError             5   no valid checkpoint, or one that does not match
├── NumericalError              7   a non-finite loss, gradient or weight
├── WeightSyncError             7   an engine does not hold the learner's weights
│   └── StaleWeightsError       7   an engine was asked to write with a version it does not hold
├── StorageError                8   the run directory cannot be written
├── ScorerError                 9   too many completions could not be scored
├── ActorLostError             10   an actor's process died
├── DeadlineError              11   a wait passed its limit; says which phase waited for whom and how long
├── PausedError                12   a guard, or a person, paused the campaign; `rayhf unpause` lets it go on
└── InterruptedRunError        75   told to stop (SIGTERM, Ctrl-C); the same command continues
"""

from __future__ import annotations

from typing import ClassVar


class RayhfError(Exception):
    """Base of all deliberate errors. `str(error)` is one readable line; the class decides the exit code."""

    exit_code: ClassVar[int] = 1


class ConfigError(RayhfError):
    """Refused input. The message names where (key, file or row), what was found and what was expected."""

    exit_code = 2


class PlacementError(RayhfError):
    exit_code = 2


class LockedError(RayhfError):
    exit_code = 4


class FencedError(LockedError):
    pass


class CheckpointError(RayhfError):
    exit_code = 5


class NumericalError(RayhfError):
    exit_code = 7


class WeightSyncError(RayhfError):
    exit_code = 7


class StaleWeightsError(WeightSyncError):
    pass


class StorageError(RayhfError):
    exit_code = 8


class ScorerError(RayhfError):
    exit_code = 9


class ActorLostError(RayhfError):
    exit_code = 10


class DeadlineError(RayhfError):
    exit_code = 11


class PausedError(RayhfError):
    exit_code = 12


class InterruptedRunError(RayhfError):
    exit_code = 75
