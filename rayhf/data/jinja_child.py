"""The process that renders templates, started by jinja_sandbox.py as a script.

In, on stdin: one JSON line per job, {"kind", "source", "limit", "items"}; an item is the variables
of one rendering. Out, on stdout: one JSON line that says whether the source compiles, then one per
item: {"value"} or {"error"}. A rendering that needs more than CPU_S of CPU time ends the process,
by a timer of the kernel, also within a function in C; one that needs more memory fails.

Imports only the standard library and jinja2, so that it starts quickly.
"""

import json
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 5.0
"""Limit on the CPU time of one rendering, and of compiling a template."""
MEMORY_BYTES = 1 << 30
"""Limit on the address space of the process."""
_MAX_ITEMS = 1 << 20
"""Limit on the length that a repetition gives."""
_MAX_MESSAGE = 300


class ClockError(Exception):
    """The template prints the date."""


class Limited(ImmutableSandboxedEnvironment):
    """Sandbox in which repetition and powers cannot fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator. Raises OverflowError where it is too large."""
        if operator == "**" and (abs(left) > 1e6 or abs(right) > 100):
            raise OverflowError("a power of such numbers is too large")
        if operator == "*":
            for sized, count in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and len(sized) * count > _MAX_ITEMS:
                    raise OverflowError(f"a repetition gives more than {_MAX_ITEMS:,} items")
        return super().call_binop(context, operator, left, right)


class Generation(jinja2.ext.Extension):
    """The block {% generation %}, which marks an assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012  jinja2 reads it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the block's content, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def chat_environment() -> jinja2.Environment:
    """Return the environment of chat templates, which is the one of transformers."""
    environment = Limited(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _refuse_clock
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _refuse_clock(form: str) -> NoReturn:
    raise ClockError(form)


class Job:
    """A compiled template or expression."""

    def __init__(self, kind: str, source: str, limit: int) -> None:
        self._limit = limit
        self._expression: Any = None
        if kind == "chat":
            self._template = chat_environment().from_string(source)
            return
        environment = Limited(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=kind == "text_newline"
        )
        if kind == "expression":
            self._expression = environment.compile_expression(source, undefined_to_none=False)
        else:
            self._template = environment.from_string(source)

    def run(self, variables: dict[str, Any]) -> Any:
        """Return the text, or the value of the expression."""
        if self._expression is not None:
            value = self._expression(variables)
            return value if isinstance(value, bool | int | float | str | None) else repr(value)
        pieces = []
        size = 0
        for piece in self._template.generate(variables):
            size += len(piece)
            if size > self._limit:
                raise OverflowError(f"the text has more than {self._limit:,} characters")
            pieces.append(piece)
        return "".join(pieces)


def _limited(call: Any, *arguments: Any) -> dict[str, Any]:
    """Return {"value"} of a call within the limit on CPU time, or {"error"}."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        return {"value": call(*arguments)}
    except Exception as error:  # noqa: BLE001  an expression over foreign data may raise anything
        message = " ".join(str(error)[:_MAX_MESSAGE].split())
        facts = {
            "type": type(error).__name__,
            "message": message or type(error).__name__,
            "refuses": isinstance(error, jinja2.TemplateError),
            "line": getattr(error, "lineno", None),
        }
        return {"error": facts}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _send(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answer one job after the other, until the parent is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in sys.stdin:
        job = json.loads(line)
        key = (job["kind"], job["source"], job["limit"])
        if key not in compiled:
            if len(compiled) > 64:
                compiled.clear()
            compiled[key] = _limited(Job, *key)
        answer = compiled[key]
        _send({name: True if name == "value" else fact for name, fact in answer.items()})
        if "value" in answer:
            for variables in job["items"]:
                _send(_limited(answer["value"].run, variables))


if __name__ == "__main__":
    main()
