"""Check an endpoint before anything starts, by one request of a few tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rayhf.config.service import is_loopback
from rayhf.errors import ConfigError, UnreachableError, nearest
from rayhf.scorer.endpoint import MalformedError, read_completion
from rayhf.scorer.endpoint_config import (
    NO_KEY,
    EndpointConfig,
    client_options,
    complete_body,
    describe,
    read_key,
)

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 30.0
_LISTED = 5
_TOKENS = 16


def check_endpoint(config: EndpointConfig) -> None:
    """Send one small request.

    Raises ConfigError where the key or the model is refused, UnreachableError where there is no
    response.
    """
    import openai

    key = read_key(config)
    parts = urlsplit(config.url)
    if key != NO_KEY and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        logger.warning("%s: the key is sent unencrypted; expected https", config.url)
    options = client_options(config, key)
    options["timeout"] = min(config.timeout_s, CHECK_TIMEOUT_S)
    with openai.OpenAI(**options) as client:
        try:
            completion = client.chat.completions.create(
                model=config.model,
                messages=[{"role": "user", "content": "Answer yes."}],
                extra_body=complete_body({"max_tokens": _TOKENS, "seed": 0}, config),
            )
            read_completion(completion)
        except openai.RateLimitError as error:
            logger.warning("%s: busy (%s)", config.url, describe(error, key))
        except openai.NotFoundError as error:
            raise ConfigError(_not_found(client, config, describe(error, key))) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            given = (
                "no key was sent; set endpoint.api_key_env"
                if config.api_key_env is None
                else f"it refused the key in {config.api_key_env}"
            )
            raise ConfigError(f"endpoint {config.url}: {given} ({describe(error, key)})") from None
        except openai.APIStatusError as error:
            message = f"endpoint {config.url}: {describe(error, key)}"
            if error.status_code >= 500 or error.status_code == 408:
                raise UnreachableError(message) from None
            raise ConfigError(message) from None
        except (MalformedError, ValueError) as error:
            raise ConfigError(f"endpoint {config.url}: {describe(error, key)}") from None
        except openai.APIConnectionError as error:
            raise UnreachableError(
                f"endpoint {config.url} does not respond: {describe(error, key)}"
            ) from None


def _not_found(client: openai.OpenAI, config: EndpointConfig, reason: str) -> str:
    """Return why a request found nothing: the models that are there, or a wrong URL."""
    import openai

    try:
        names = sorted(entry.id for entry in client.models.list())
    except (openai.OpenAIError, ValueError, AttributeError, TypeError):
        return f"endpoint {config.url}: {reason}; it lists no models either: does the URL miss /v1?"
    model = config.model
    if model in names:
        return f"endpoint {config.url}: {reason}"
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    return (
        f"endpoint {config.url}: there is no model {model!r}{nearest(model, names)}; "
        f"it serves {listed or 'none'}"
    )
