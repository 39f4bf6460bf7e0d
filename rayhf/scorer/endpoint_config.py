"""Settings of an OpenAI-compatible server, and what every request to it has in common."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from rayhf.config.base import Section
from rayhf.errors import ConfigError

NO_KEY = "none"
"""Sent where no key is configured: the client must never pick up OPENAI_API_KEY by itself."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REASON_CHARS = 300
_SPECIAL = (
    r"<[|\uff5c][^<>\s]{1,40}[|\uff5c]>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|<</?SYS>>"
)
"""Special tokens of Llama, Qwen, Gemma, Mistral, Phi, DeepSeek and their kin."""


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an http(s) URL, for example http://gpu-7:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "expected a URL without user, password or query; name the variable that holds the key "
            "in api_key_env"
        )
    return url.rstrip("/")


def _check_variable(name: str) -> str:
    # The value is not repeated: it may be the key itself.
    if not _VARIABLE.fullmatch(name):
        raise ValueError("expected the name of an environment variable, not the key itself")
    return name


class Price(Section):
    """Price of a million tokens, in any currency."""

    input: NonNegativeFloat = 0.0
    output: NonNegativeFloat = 0.0


class EndpointConfig(Section):
    """An OpenAI-compatible server and how to call it."""

    url: Annotated[str, AfterValidator(_check_url)]
    """Base URL; it usually ends in /v1."""
    model: Annotated[str, Field(min_length=1)]
    """The model's name there."""
    api_key_env: Annotated[str, AfterValidator(_check_variable)] | None = None
    """Environment variable that holds the key. Default: no key."""
    concurrency: PositiveInt = 32
    """Maximum number of requests in flight."""
    timeout_s: PositiveFloat = 120.0
    """Deadline of one request with its retries, in seconds."""
    retries: NonNegativeInt = 4
    """Maximum number of retries where the server is down or fails; where it is too busy (429), a
    request is retried until its deadline."""
    structured: Literal["auto", "json_schema", "off"] = "auto"
    """Whether the server must keep the verdict to a JSON schema (response_format). auto: until it
    refuses to."""
    special_tokens: tuple[Annotated[str, Field(min_length=2)], ...] = ()
    """Special tokens of the model that a completion could spell to end the judge's question. They
    are broken up with a space, as <|...|>, <s>, [INST], <start_of_turn> and the like always are."""
    extra: Mapping[str, JsonValue] = {}
    """Further fields of each request, for example {top_p: 0.9}; null leaves one of ours out."""
    price: Price | None = None
    """Adds the metric scorer/<name>/cost."""


def client_options(config: EndpointConfig, key: str) -> dict[str, Any]:
    """Return the options of an openai client. Its own retries are off."""
    return {
        "base_url": config.url,
        "api_key": key,
        "max_retries": 0,
        "timeout": config.timeout_s,
    }


def read_key(config: EndpointConfig) -> str:
    """Return the key from the environment. Raises ConfigError where it is not set."""
    if config.api_key_env is None:
        return NO_KEY
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"endpoint.api_key_env: the environment variable {config.api_key_env} is not set here; "
            "the nodes of a cluster need it, too"
        )
    return key


def complete_body(body: Mapping[str, Any], config: EndpointConfig) -> dict[str, Any]:
    """Return the fields of a request, those of `extra` last."""
    merged = {**body, **config.extra}
    return {name: value for name, value in merged.items() if value is not None}


def token_escaper(config: EndpointConfig) -> Callable[[str], str]:
    """Return a function that breaks up special tokens in a text with a space.

    The model's tokenizer is not here, so these are the tokens of common chat templates and those of
    the config.
    """
    special = re.compile("|".join([_SPECIAL, *map(re.escape, config.special_tokens)]))

    def escape(text: str) -> str:
        while special.search(text):  # repeatedly, because tokens may overlap
            text = special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    return escape


def response_format(schema: Mapping[str, JsonValue]) -> dict[str, Any]:
    """Return the field that makes a server keep its reply to a JSON schema."""
    return {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "schema": dict(schema), "strict": True},
    }


def describe(error: BaseException, key: str) -> str:
    """Return an error in one line, without the key."""
    import openai

    if isinstance(error, openai.APIStatusError):
        body = error.body
        message = body.get("message") if isinstance(body, Mapping) else None
        text = f"{error.status_code}: {message or error.message}"
    elif isinstance(error, openai.APIConnectionError):
        text = f"{error.message} ({error.__cause__ or 'no response'})"
    else:
        text = str(error)
    line = " ".join(text.replace(key, "[key]").split() if key != NO_KEY else text.split())
    return line[:_REASON_CHARS]
