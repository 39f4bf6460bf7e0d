"""`rayhf init`: a starting config with comments, a reward function, example rows and a README.

The comments of the config are the help of its keys, from the config classes.
"""

from __future__ import annotations

import json
import random
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from rayhf.config.models import ModelName
from rayhf.config.registry import ALGORITHMS, summary
from rayhf.config.schema import (
    ClusterConfig,
    LearnerConfig,
    PolicyConfig,
    PromptsConfig,
    ReferenceConfig,
    RolloutConfig,
    RunConfig,
)
from rayhf.config.scorers import ScorerConfig
from rayhf.config.yaml_text import dump_flow
from rayhf.errors import ConfigError
from rayhf.models.source import missing_hint

Device = Literal["cpu", "gpu"]
Values = Mapping[str, Any]

GIVEN_ROWS = ("sft", "dpo", "kto")
"""Algorithms that train on given rows; their scorer judges held-out completions only."""
COMPARING = ("sppo", "inpo")
"""Algorithms whose scorer compares completions."""
TAUGHT = ("distill",)
"""Algorithms with a teacher in place of a scorer; theirs judges held-out completions only."""
BEGINNER_KEYS = (
    *("samples", "pairs", "loss", "beta", "kl", "kl_coef", "eta", "tau", "offline"),
    *("critic_warmup", "train_on", "threshold", "reward_coef", "depth", "width", "step_tokens"),
    *("judge_votes", "last_only"),
)
"""Keys of algorithms that a first config shows, where an algorithm has them."""

REWARDS = '''\
"""Scorers of this project. config.yaml names them as rewards:FUNCTION."""

import re


def score(completion: str, *, reference_answer: str) -> float:
    """Return 1 where the last number is the reference answer, else 0; higher is better.

    Parameters are found by name: prompt, messages, finish_reason, and the columns of the row.
    """
    numbers = re.findall(r"-?\\d+", completion)
    return float(bool(numbers) and numbers[-1] == reference_answer)


def prefer(first: str, second: str, *, reference_answer: str) -> float:
    """Return the probability that `first` is the better completion."""
    difference = score(first, reference_answer=reference_answer) - score(
        second, reference_answer=reference_answer
    )
    return 0.5 + difference / 2
'''

README = """\
# {name}

{summary} Model: `{model}`.

```sh
rayhf check config.yaml                # refuses what cannot work, and prints the plan
rayhf run config.yaml                  # starts, or continues what is in runs/first
rayhf status runs/first                # state, health and next step
rayhf export runs/first my-policy      # the trained policy as a Hugging Face directory
```

Run them in this directory: the paths in `config.yaml` start here.

1. `data/` has {rows} made-up rows to train on and {heldout} held-out ones
   ({columns}). Replace them with your own; `prompts.train`
   also takes a hub data set.
2. `rewards.py` has the functions that score completions. {role}
3. `config.yaml` has the keys to begin with. `rayhf config config.yaml` prints all of them with
   their defaults, and `rayhf config --schema > schema.json` writes a schema for editors.
"""


def write_project(directory: Path, algorithm: str, model: str, device: Device) -> list[Path]:
    """Write a project into a new or empty directory; return its files.

    Raises ConfigError for a directory with files in it, an unknown algorithm and a model that is
    neither a directory nor a hub name.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not an empty directory; expected a new one")
    try:
        plugin = ALGORITHMS.resolve(algorithm)
    except ValueError as error:
        raise ConfigError(f"--algorithm: {error}") from None
    rows = _rows(algorithm)
    readme = README.format(
        name=directory.resolve().name,
        summary=summary(plugin),
        model=model,
        rows=len(rows["train"]),
        heldout=len(rows["heldout"]),
        columns=", ".join(f"`{column}`" for column in rows["train"][0]),
        role=_role(algorithm),
    )
    files = {
        "config.yaml": _config(algorithm, plugin, _model(model), device),
        "rewards.py": REWARDS,
        "README.md": readme,
        **{
            f"data/{name}.jsonl": "".join(f"{json.dumps(row)}\n" for row in lines)
            for name, lines in rows.items()
        },
    }
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [directory / name for name in files]


def _role(algorithm: str) -> str:
    """Return what the project's reward function is for."""
    if algorithm in GIVEN_ROWS:
        return f"Here they measure only: {algorithm} trains on the rows."
    if algorithm in TAUGHT:
        return "Here they measure only: the policy learns from `reference.model`; name a teacher."
    return "Higher is better."


def _model(text: str) -> str:
    """Return a hub name as it is, a directory's path from the root. Raises ConfigError."""
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if ModelName(text).repository is None:
        raise ConfigError(
            f"--model: {text} is no directory; expected one, or a hub name such as "
            f"Qwen/Qwen3-0.6B{missing_hint(Path(text))}"
        )
    return text


def _config(algorithm: str, plugin: type[Any], model: str, device: Device) -> str:
    """Return the config: some keys of each section, each below its help."""
    scorer_type = "pairwise_rule" if algorithm in COMPARING else "rule"
    function = "rewards:prefer" if algorithm in COMPARING else "rewards:score"
    use = "evaluate" if algorithm in (*GIVEN_ROWS, *TAUGHT) else "train"
    scorers: dict[str, Any] = {use: [{"type": scorer_type, "function": function}]}
    if algorithm in COMPARING:
        scorers["evaluate"] = [{"type": "rule", "function": "rewards:score"}]
    dtype = "float32" if device == "cpu" else "bfloat16"
    sections: dict[str, tuple[type[BaseModel], Values]] = {
        "run": (RunConfig, {"dir": "runs/first", "iterations": 4, "eval_every": 2}),
        "policy": (PolicyConfig, {"model": model, "dtype": dtype}),
        "prompts": (
            PromptsConfig,
            {
                "train": "data/train.jsonl",
                "heldout": "data/heldout.jsonl",
                "task": "sums",
                "batch": 16,
            },
        ),
        "algorithm": (plugin.Config, {"type": algorithm, **_settings(plugin.Config)}),
        "rollout": (RolloutConfig, {"max_tokens": 128}),
        "scorer": (ScorerConfig, scorers),
        "learner": (LearnerConfig, {"lr": 1e-6, "dtype": dtype}),
        "cluster": (ClusterConfig, {"device": device}),
    }
    if algorithm in TAUGHT:
        sections["reference"] = (ReferenceConfig, {"model": model})
    blocks = [
        _wrapped(summary(plugin), ""),
        "# Other keys have defaults; `rayhf config config.yaml` prints them all.\n",
        "seed: 0\n",
    ]
    for name, (section, values) in sections.items():
        blocks.append(f"\n{name}:\n{''.join(_lines(section, values))}")
    return "".join(blocks)


def _settings(config: type[BaseModel]) -> Values:
    """Return an algorithm's keys to begin with, with their defaults."""
    settings: dict[str, Any] = {}
    for key, field in config.model_fields.items():
        if key not in BEGINNER_KEYS:
            continue
        if key == "offline":  # a file of pairs
            if field.is_required():
                settings[key] = {"path": "data/pairs.jsonl"}
        else:
            settings[key] = _plain(field.get_default(call_default_factory=True))
    return settings


def _plain(value: object) -> object:
    """Return a default as a plain value, sections without what is null."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    return list(value) if isinstance(value, tuple) else value


def _lines(section: type[BaseModel], values: Values) -> Iterator[str]:
    for key, value in values.items():
        if key != "type":
            yield _wrapped(section.model_fields[key].description or "", "  ")
        yield f"  {key}: {dump_flow(value)}\n"


def _wrapped(text: str, indent: str) -> str:
    start = f"{indent}# "
    lines = textwrap.wrap(" ".join(text.split()), width=88)
    return "".join(f"{start}{line}\n" for line in lines)


def _rows(algorithm: str) -> dict[str, list[dict[str, Any]]]:
    """Return example rows by file: sums of three numbers, none of them in two files.

    In the words of the tiny world's arithmetic, so that its small policy can learn from them.
    """
    sums = list(product(range(1, 10), repeat=3))
    drawn = random.Random(0).sample(sums, 96)
    heldout = [_prompt(*pair) for pair in drawn[:16]]
    rows = {"train": [_given(algorithm, *pair) for pair in drawn[16:80]], "heldout": heldout}
    if algorithm == "hypo":
        rows["pairs"] = [_given("dpo", *pair) for pair in drawn[80:]]
    return rows


def _prompt(*terms: int) -> dict[str, Any]:
    return {"prompt": f"What is {'+'.join(map(str, terms))}?", "answer": str(sum(terms))}


def _given(algorithm: str, *terms: int) -> dict[str, Any]:
    """Return a row of prompts.train as the algorithm takes it."""
    row = _prompt(*terms)
    right = str(row.pop("answer"))
    wrong = str(int(right) + 1)
    if algorithm == "sft":
        return row | {"completion": right}
    if algorithm == "dpo":
        return row | {"chosen": right, "rejected": wrong}
    if algorithm == "kto":
        liked = terms[0] % 2 == 0
        return row | {"completion": right if liked else wrong, "label": liked}
    return row | {"answer": right}


def show(directory: Path, files: Sequence[Path]) -> str:
    """Return the lines that say what was written and what comes next."""
    names = ", ".join(str(path.relative_to(directory)) for path in files)
    return (
        f"wrote {names} to {directory}\n"
        f"next: cd {directory} && rayhf check config.yaml && rayhf run config.yaml"
    )
