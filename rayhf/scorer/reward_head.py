"""Outputs of a reward model: several of them weighted, or those of a head of your own.

A head is a class, named by import path, over the hidden states of the model's body:

    class Head(torch.nn.Module):
        labels = ("helpfulness", "honesty")        # names of its outputs

        def __init__(self, config):                # the body's config.json
            super().__init__()
            self.score = torch.nn.Linear(config.hidden_size, len(self.labels))

        def load(self, directory):                 # read its weights; the tensors are yours
            self.score.load_state_dict(safetensors.torch.load_file(directory / "head.safetensors"))

        def forward(self, hidden_BTD, mask_BT):    # right-padded; the mask is 1 on tokens
            last_B = mask_BT.sum(1) - 1
            return self.score(hidden_BTD[range(len(last_B)), last_B])    # (B, labels)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rayhf.errors import ConfigError, nearest, one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def output_weights(outputs: Mapping[str, float] | None, labels: Sequence[str]) -> tuple[float, ...]:
    """Return the weight of each output.

    Args:
        outputs: weights by label or index; None where there is only one output.
        labels: names of the outputs, in order.

    Raises ConfigError for an unknown label, and without weights for several outputs.
    """
    if outputs is None:
        if len(labels) == 1:
            return (1.0,)
        raise ConfigError(
            f"it has {len(labels)} outputs ({', '.join(labels[:8])}), expected 1; set their "
            f"weights, for example outputs: {{{labels[0]}: 1.0}}"
        )
    weights = [0.0] * len(labels)
    for name, weight in outputs.items():
        if name in labels:
            weights[labels.index(name)] = weight
        elif name.isdigit() and int(name) < len(labels):
            weights[int(name)] = weight
        else:
            raise ConfigError(f"outputs: it has no output {name!r}{nearest(name, labels)}")
    return tuple(weights)


def import_head(path: str) -> type[Any]:
    """Import the class of a head. Raises ConfigError where it is none."""
    module_name, _, class_name = path.partition(":")
    try:
        head = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # noqa: BLE001  importing foreign code may raise anything
        raise ConfigError(f"head {path} cannot be imported ({one_line(error)})") from None
    missing = [name for name in ("labels", "load", "forward") if not hasattr(head, name)]
    if not isinstance(head, type) or missing:
        raise ConfigError(
            f"head {path}: expected a torch.nn.Module class with labels, load and forward"
            + (f"; it has no {', '.join(missing)}" if missing else "")
        )
    return head


def with_head(body: PreTrainedModel, path: str, directory: Path) -> PreTrainedModel:
    """Return the body with a loaded head on it, which behaves as a sequence classifier.

    Raises ConfigError where the head cannot be built or loaded.
    """
    from torch import nn

    class Headed(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.body = body
            self.head = head
            self.config = body.config

        def get_input_embeddings(self) -> nn.Module:
            embeddings: nn.Module = body.get_input_embeddings()
            return embeddings

        def forward(self, input_ids: Any, attention_mask: Any) -> SimpleNamespace:
            hidden = self.body(input_ids=input_ids, attention_mask=attention_mask)
            return SimpleNamespace(logits=self.head(hidden.last_hidden_state, attention_mask))

    try:
        head = import_head(path)(body.config)
        head.load(directory)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  foreign code may raise anything
        raise ConfigError(
            f"head {path} cannot be loaded from {directory}: {one_line(error)}"
        ) from None
    model: Any = Headed(head.to(body.dtype))
    headed: PreTrainedModel = model
    return headed
