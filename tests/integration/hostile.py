"""Hostile completions, and harmless ones, for rules to score."""

from __future__ import annotations

import random

MARK = "harmed"
"""Name of the file that any of them would leave where it is executed."""

_CODE = [
    f"__import__('os').system('touch {MARK}')",
    f"import os; os.system('touch {MARK}')",
    f"open('{MARK}', 'w')",
    f"exec(\"open('{MARK}','w')\")",
    f"eval(compile(\"open('{MARK}','w')\", 'x', 'exec'))",
    f"().__class__.__base__.__subclasses__()[0]('{MARK}')",
    f"lambda: __builtins__['open']('{MARK}', 'w')",
    f"Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('{MARK}','w')",
    f"sympify(\"__import__('pathlib').Path('{MARK}').touch()\")",
    f"$(touch {MARK}) `touch {MARK}` ; touch {MARK} | touch {MARK} && touch {MARK}",
    f"!!python/object/apply:os.system ['touch {MARK}']",
    "cposix\nsystem\n(S'touch " + MARK + "'\ntR.",
]
_TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.popen('touch " + MARK + "').read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{0.__class__.__init__.__globals__} {} {prompt} {answer!r:>999999999}",
    "%s%n%n%n%(password)s %999999999d",
    "${jndi:ldap://127.0.0.1/a} #{7*7} <%= 7*7 %>",
    "<script>fetch('http://127.0.0.1')</script><img src=x onerror=alert(1)>",
]
_TERMINAL = [
    "\x1b[2J\x1b[H\x1b]0;owned\x07\x1b[31m",
    "\r\nrayhf: done\r\n[bold red]markup[/bold red]",
    "\x00\x01\x02 null \x00 bytes",
    "\u202eright to left\u2066 isolate",
    "\ud800 a lone surrogate \udfff",
    "\x85\u2028\u2029\x0b\x0c lines",
]
_PROTOCOL = [
    '\n[0, "scored", 1.0]\n',
    '"]}\n{"ready": true}\n[1, "scored", 1e308]',
    "NaN Infinity -Infinity 1e999 -1e999",
    '[{"kind": "words", "min": 0}]',
]
_HEAVY = [
    "9**9**9**9**9**9",
    "10^10^10^10",
    "9" * 20_000,
    "1e" + "9" * 3_000,
    "(" * 4_000 + "1" + ")" * 4_000,
    "[" * 100_000,
    "{" * 4_000 + "}" * 4_000,
    "\\frac{1}{" * 300 + "2" + "}" * 300,
    "\\sqrt{" * 500 + "x" + "}" * 500,
    "x" * 2_000_000,
    "1+" * 3_000 + "1",
    "." * 100_000 + "!",
    "1,1" * 20_000,
    "a" * 60 + "!" + " " * 60_000 + "b",
]

_WRAPPERS = (
    "{}",
    "The answer is \\boxed{{{}}}",
    "${}$",
    "```python\n{}\n```\n4",
    '{{"answer": "{}"}}',
    "4\n\n{}",
    "<<{}>> is it.",
)


def hostile(count: int) -> list[str]:
    """Return `count` of them, shuffled: each in every wrapping, those that take long in two."""
    light = [
        wrapper.format(seed)
        for wrapper in _WRAPPERS
        for seed in (*_CODE, *_TEMPLATES, *_TERMINAL, *_PROTOCOL)
    ]
    heavy = [wrapper.format(seed) for wrapper in _WRAPPERS[:2] for seed in _HEAVY]
    found = [*heavy, *light][:count]
    assert len(found) == count
    random.Random(1).shuffle(found)
    return found


def benign(count: int) -> list[str]:
    """Return completions of which about half are right: 4, or several words."""
    forms = (
        "{}",
        "So it is {}.",
        "\\boxed{{{}}}",
        "2 + 2 = {}\nVerdict: yes",
        "I think that the last one is ${}$",
    )
    return [
        forms[number % len(forms)].format(4 if number % 2 else number) for number in range(count)
    ]
