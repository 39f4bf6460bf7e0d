"""The policy's chat template, with what the config sets: its text, its variables, its date.

In: `policy.chat_template`, `policy.chat_template_kwargs` and `policy.chat_date`. Out: a tokenizer
whose chat template contains all three. Variables and date become Jinja statements in front of the
template, so that everything that renders gets them: prompts, what an algorithm asks the policy, and
whoever uses an exported policy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from rayhf.config.schema import PolicyConfig
from rayhf.errors import ConfigError
from rayhf.models.directory import vocabulary_size
from rayhf.models.source import ModelConfig, load_tokenizer
from rayhf.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
_OWN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
"""Names that rayhf or transformers gives to a template."""
_DIRECTIVES = (
    *(f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyY"),
    *(f"%-{letter}" for letter in "dmHIMSj"),
)
"""What `strftime` replaces in a format, as far as templates use it."""


def policy_tokenizer(
    directory: Path, policy: PolicyConfig, *, base: Path
) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer with the chat template that the config sets.

    A relative path of a template starts at `base`. Raises ConfigError.
    """
    given = policy.chat_template
    template = None if given is None else _template_text(given, base)
    tokenizer = load_tokenizer(directory, key="policy.model", template=template)
    text = tokenizer.get_chat_template()
    _check_variables(policy.chat_template_kwargs, text)
    if given is not None or policy.chat_template_kwargs or policy.chat_date is not None:
        tokenizer.chat_template = template_with(
            text, policy.chat_template_kwargs, today=policy.chat_date
        )
    return tokenizer


def exported_files(policy: PolicyConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the files of an exported policy that differ from the model directory's, by name."""
    own = policy.chat_template is None and not policy.chat_template_kwargs
    return {} if own and policy.chat_date is None else {TEMPLATE_FILE: tokenizer.chat_template}


def _template_text(value: str, base: Path) -> str:
    """Return a template that is given as its text or as the path of a file."""
    if "{{" in value or "{%" in value:
        return value
    file = base / value
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"policy.chat_template: {file} cannot be read ({error}); expected a text file, or a "
            "template itself (with {{ ... }} or {% ... %})"
        ) from None


def _check_variables(variables: dict[str, JsonValue], template: str) -> None:
    """Raise ConfigError for a variable that cannot be set, or that the template does not read."""
    for name, value in variables.items():
        where = f"policy.chat_template_kwargs.{name}"
        if not name.isidentifier() or name in _OWN:
            raise ConfigError(f"{where}: no variable of this name can be set")
        if not re.search(rf"\b{name}\b", template):
            raise ConfigError(f"{where}: the chat template does not read a variable of this name")
        if "null" in re.findall(r'"(?:\\.|[^"\\])*"|null', json.dumps(value)):
            raise ConfigError(f"{where}: null is not a value that Jinja knows; leave it out")


def template_with(
    template: str, variables: dict[str, JsonValue], *, today: date | None = None
) -> str:
    """Return the template with default values of variables, and with `today` as its date.

    Whoever renders it can still give these variables other values. The function strftime_now, with
    which templates print the date, is replaced by one that formats `today`.
    """
    statements = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in variables.items()
    ]
    if today is not None and "strftime_now" in template:
        moment = datetime(today.year, today.month, today.day)
        replaced = "".join(
            f" | replace({_literal(directive)}, {_literal(moment.strftime(directive))})"
            for directive in _DIRECTIVES
        )
        statements.append(
            f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
        )
    # The line break after the last statement is not part of the text: transformers trims it.
    return "".join(statements) + "\n" + template if statements else template


def _literal(value: Any) -> str:
    """Return a JSON value as a Jinja expression."""
    return json.dumps(value, ensure_ascii=False)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Check that the model has an embedding for every token that a text can contain.

    Special tokens without one are allowed: text that is rendered while a campaign runs cannot
    contain them, and prompts that do are refused. Raises ConfigError that names the tokens.
    """
    size = vocabulary_size(config)
    if size is None:
        return
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = sorted(
        (token_id, token)
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= size and token_id not in special
    )
    if beyond:
        named = ", ".join(f"{token!r} ({token_id})" for token_id, token in beyond[:3])
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        raise ConfigError(
            f"policy.model: the tokenizer has tokens without an embedding: {named}{more}; there "
            f"are {size} embeddings; resize them, or use the model's own tokenizer"
        )


def check_embeddings(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    size: int | None,
    *,
    where: str,
) -> None:
    """Check that all tokens of the prompts are below `size`. Raises ConfigError."""
    for prompt in prompts:
        highest = max(prompt.token_ids)
        if size is not None and highest >= size:
            raise ConfigError(
                f"{where}: the prompt {prompt.messages[-1]['content'][:60]!r} contains the token "
                f"{tokenizer.convert_ids_to_tokens(highest)} ({highest}), and the model has "
                f"embeddings for {size} tokens only"
            )
