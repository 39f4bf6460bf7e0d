"""All errors that rayhf raises on purpose.

Each can be pickled, says what it got, and has an exit code and a remedy.

RayhfError                      1   base of the others, for `except` at the command line
├── ActorError                  1   an actor raised an error that rayhf does not expect
├── ConfigError                 2   a key, a file or a row of the user's input is refused before
│   │                               anything starts
│   └── QuotaError              2   a limit on what is handed in is reached
├── PlacementError              2   the cluster does not have the resources that the config needs
├── LockedError                 4   another process is writing this run directory
│   └── FencedError             4   a later attempt owns the run directory, or its lock file was
                                    removed: this one may not write
├── CheckpointError             5   no valid checkpoint, or one that does not match
├── SecurityError               6   a cluster without token authentication, or a secret that others
                                    can read
├── NumericalError              7   a non-finite loss, gradient or weight
├── WeightSyncError             7   an engine does not hold the learner's weights
│   └── StaleWeightsError       7   a request for a weight version that an engine does not hold
├── StorageError                8   the run directory cannot be read or written
├── ScorerError                 9   too many completions could not be scored
├── ActorLostError             10   an actor's process died too often
│   ├── GpuMemoryError         10   a GPU has too little free memory for an engine to start
│   └── StateLostError         10   what an actor needs was lost with a process; the last commit
│                                   has an earlier state
├── DeadlineError              11   a wait passed its limit; says which phase waited for which actor
├── PausedError                12   a guard paused the campaign; `rayhf unpause` resumes it
├── ServiceError               13   a gRPC service refused a call
│   └── UnreachableError       13   it did not respond: it is down, too slow, or too busy
└── InterruptedRunError        75   stopped by SIGTERM, Ctrl-C or `rayhf stop`; the same command
                                    continues
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection, Sequence
from typing import ClassVar

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ESCAPE_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
"""Codes that control a terminal: colors, cursor, title."""
REASON_CHARS = 600
"""Limit on foreign text in a message."""
_CUT = "\n[...]\n"


SHOWN = 5
"""Problems that one message lists."""


def listed(problems: Sequence[str]) -> str:
    """Return problems of an input as one line: numbered where there are several."""
    if len(problems) == 1:
        return problems[0]
    shown = "; ".join(f"({number}) {text}" for number, text in enumerate(problems[:SHOWN], 1))
    more = len(problems) - SHOWN
    rest = f"; {more} more, which are shown once these are corrected" if more > 0 else ""
    return f"{len(problems)} problems: {shown}{rest}"


def is_full_disk(error: BaseException) -> bool:
    """Return whether a foreign error says that a disk is full.

    Libraries in other languages only say so in their text.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return "No space left on device" in str(error)


class RayhfError(Exception):
    """Base of all deliberate errors.

    `str(error)` is one readable line; the class decides the exit code.
    """

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "an error that rayhf does not expect"
    remedy: ClassVar[str] = "`rayhf --debug ...` prints where; please report it"


class ConfigError(RayhfError):
    """Refused input: where (key, file or row), what it is, and what is expected."""

    exit_code = 2
    meaning = "a key, a file or a row of the input was refused before anything started"
    remedy = "correct what the message names"


class QuotaError(ConfigError):
    """A limit on what is handed in is reached; a service reports it as RESOURCE_EXHAUSTED."""

    meaning = "a limit on what is handed in was reached; nothing was stored"
    remedy = "hand in less, or later, as the message says"


class PlacementError(RayhfError):
    exit_code = 2
    meaning = "the cluster does not have the resources that the config needs"
    remedy = "request less in `cluster`, `rollout`, `learner`, or add nodes"


class ActorError(RayhfError):
    """An error that rayhf does not expect, raised in an actor; its cause is Ray's error."""


class LockedError(RayhfError):
    exit_code = 4
    meaning = "another process is running this campaign"
    remedy = "wait for it, or end the process that the message names"


class FencedError(LockedError):
    meaning = (
        "a later attempt owns the run directory, or the lock file was removed; nothing was written "
        "since"
    )
    remedy = "nothing where a later attempt runs; otherwise the same command continues"


class CheckpointError(RayhfError):
    exit_code = 5
    meaning = "no checkpoint is valid, or the run directory is not what was committed"
    remedy = (
        "`rayhf verify RUN` names the files; restore them from a copy, or start in another run.dir"
    )


class SecurityError(RayhfError):
    exit_code = 6
    meaning = (
        "the cluster has no token authentication, or others could read a secret; nothing was sent"
    )
    remedy = (
        "start the cluster with RAY_AUTH_MODE=token, keep the token in a file of mode 600 "
        "(docs/security.md)"
    )


class NumericalError(RayhfError):
    exit_code = 7
    meaning = "a loss, a gradient or a weight was not finite; the last commit is"
    remedy = (
        "lower learner.lr, look at the metrics and samples of the last iterations; the same "
        "command continues"
    )


class WeightSyncError(RayhfError):
    exit_code = 7
    meaning = "an engine does not hold the learner's weights"
    remedy = "the same command continues with new engines; please report it if it happens again"


class StaleWeightsError(WeightSyncError):
    meaning = "a request named weights that the engine does not hold"


class StorageError(RayhfError):
    exit_code = 8
    meaning = "the run directory cannot be read or written; the last commit is complete"
    remedy = "free space or repair the permissions; the same command continues"


class ScorerError(RayhfError):
    exit_code = 9
    meaning = (
        "too many completions could not be scored, and none was trained on; or a served scorer is "
        "broken"
    )
    remedy = "repair the scorer that the message names; the same command continues"


class ActorLostError(RayhfError):
    exit_code = 10
    meaning = "an actor was lost more often than run.restarts allows"
    remedy = (
        "look for memory in the message and in logs/attempt-*/stacks; the same command continues"
    )


class GpuMemoryError(ActorLostError):
    """Too little free memory on a GPU at the moment: other processes may still hold some."""

    meaning = "a GPU had too little free memory for an engine to start"
    remedy = (
        "end what else runs on the GPU, or lower rollout.memory_fraction; the same command "
        "continues"
    )


class StateLostError(ActorLostError):
    """What an actor needs was lost with a process that had it: all actors restart from the commit.

    The state of an actor that has no copy, or new weights whose learner is gone: no restart of the
    actor that asks for them brings them back.
    """

    meaning = "an actor was lost with weights that nothing else has, too often"
    remedy = (
        "as of ActorLostError; of a moving average a second replica keeps a copy "
        "(reference.replicas)"
    )


class DeadlineError(RayhfError):
    exit_code = 11
    meaning = "a wait passed its limit more often than run.restarts allows"
    remedy = (
        "logs/attempt-*/stacks shows where a process hung; raise run.timeout_s if the work is only "
        "slow"
    )


class PausedError(RayhfError):
    exit_code = 12
    meaning = "a guard found the campaign unhealthy; the last healthy commit is the newest"
    remedy = "change the config as the message says, or `rayhf unpause RUN`, then the same command"


class ServiceError(RayhfError):
    exit_code = 13
    meaning = "a gRPC service refused a call, or could not be reached"
    remedy = (
        "check that the service that the message names is up and knows this certificate and this "
        "token"
    )


class UnreachableError(ServiceError):
    """No response; the same call may succeed later."""

    meaning = "a gRPC service did not respond"


class InterruptedRunError(RayhfError):
    exit_code = 75
    meaning = "interrupted by SIGTERM, Ctrl-C or `rayhf stop`"
    remedy = "the same command continues"


def did_you_mean(word: str, valid: Collection[str]) -> str:
    """Return "; did you mean X?" for the valid word nearest to `word`, "" if none is near."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def nearest(word: str, valid: Collection[str]) -> str:
    """Return the end of a message that refuses `word`: the nearest valid word, or else all."""
    return did_you_mean(word, valid) or (f"; valid: {', '.join(valid)}" if valid else "")


def clean_line(text: str, limit: int = REASON_CHARS) -> str:
    """Return foreign text as one printable line of at most `limit` characters.

    Without escape codes; other characters that are not printable, such as lone surrogates, which no
    file format takes, become "?".
    """
    line = " ".join(_ESCAPE_CODE.sub("", text[: 16 * limit]).split())[:limit]
    if line.isprintable():
        return line
    return "".join(character if character.isprintable() else "?" for character in line)


def clean_text(text: str, limit: int) -> str:
    """Return foreign text of at most `limit` characters, cleaned as in clean_line.

    Line breaks and tabs stay. A longer text loses its middle: a verdict stands at the end.
    """
    if len(text) > limit:
        half = (limit - len(_CUT)) // 2
        text = text[:half] + _CUT + text[-half:]
    text = "\n".join(_ESCAPE_CODE.sub("", text).splitlines())
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else "?" for character in text
    )


def message_of(error: BaseException) -> str:
    """Return an error's message; "" where its own `__str__` raises, which foreign code may do."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  the error that it belongs to is reported
        return ""


def last_line(error: BaseException) -> str:
    """Return type and last line of a foreign error, which is where it says what went wrong."""
    lines = [line for line in map(clean_line, message_of(error).splitlines()) if line]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """Return type and message of an error in one line; rayhf's own errors without their type."""
    if isinstance(error, RayhfError):
        return clean_line(str(error))
    message = message_of(error)
    return clean_line(f"{type(error).__name__}: {message}" if message else type(error).__name__)
