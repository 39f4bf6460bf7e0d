"""Checks of a model directory that need no weights: files, names and shapes, modules for LoRA.

In: a directory whose config.json was read. Out: ConfigError, one line, for what would otherwise
fail after the actors have started, or would be loaded differently by transformers and vLLM. The
model is built on torch's meta device, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rayhf.errors import ConfigError
from rayhf.models.hub import has_weights
from rayhf.models.source import AS_DATA, ModelConfig
from rayhf.models.weight_files import read_json_object, stored_shapes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 12
"""Module names in a message."""


def check_model(
    path: Path,
    config: ModelConfig,
    *,
    key: str,
    causal: bool = True,
    lora_targets: Sequence[str] | Literal["all-linear"] | None = None,
) -> None:
    """Refuse a directory that cannot be trained or generated with. Raises ConfigError.

    Args:
        path: the directory.
        config: its config.json.
        key: config key that names it, for messages.
        causal: whether it must hold a whole causal language model; a critic may start from a
            scorer, whose head has other names.
        lora_targets: modules that get an adapter.
    """
    _check_settings(path, config, key=key)
    shapes = stored_shapes(path, key=key) if has_weights(path) else None
    if not causal:
        return
    model = build_on_meta(path, key=key)
    if shapes is not None:
        check_parameters(model, shapes, where=f"{key}: {path}")
    if lora_targets is not None and lora_targets != "all-linear":
        check_lora_targets(model, lora_targets)


def _check_settings(path: Path, config: ModelConfig, *, key: str) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise ConfigError(
            f"{key}: {path} is a quantized checkpoint (quant_method {method}), and its weights "
            "cannot be trained or replaced; expected the unquantized model"
        )
    generation = path / "generation_config.json"
    if generation.is_file():
        read_json_object(generation, key=key)


def build_on_meta(path: Path, *, key: str) -> PreTrainedModel:
    """Build the directory's causal language model without memory for its weights.

    Raises ConfigError where transformers cannot.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path), **AS_DATA)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # noqa: BLE001  whatever the class of the model's type raises
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{key}: transformers cannot build the model that {path / 'config.json'} describes: "
            f"{text}"
        ) from None
    return model


def check_parameters(model: PreTrainedModel, stored: Shapes, *, where: str) -> None:
    """Check that every parameter is stored, in the model's shape. Raises ConfigError.

    Tensors that the model does not have are no error: transformers and vLLM ignore them.
    """
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = own if own.keys() <= stored.keys() else _as_stored(model)
    for name, shape in expected.items():
        if name in stored and stored[name] != shape:
            raise ConfigError(
                f"{where}: {name} has shape {_text(stored[name])} in the weights, and config.json "
                f"describes {_text(shape)}; config.json and weights are of different models"
            )
    missing = [name for name in expected if name not in stored]
    if missing:
        numbers = f"{len(missing)} of the {len(expected)} tensors that config.json describes"
        raise ConfigError(
            f"{where}: the weights lack {numbers}, {missing[0]} among them; config.json and "
            "weights are of different models, or the weights are incomplete"
        )


def _as_stored(model: PreTrainedModel) -> Shapes:
    """Return the shapes of the model's parameters as its type's directories store them.

    For example the experts of a mixture, one parameter of the model, as one tensor per expert.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters())
    stored = revert_weight_conversion(model, parameters)
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def check_lora_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Check that each target names a layer that can get an adapter, as PEFT matches names.

    Raises ConfigError that names the model's layers.
    """
    layers = _adaptable(model)
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in layers):
            continue
        names = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        near = get_close_matches(target, names, n=1)
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"policy.lora.target_modules: {target} matches no linear layer of the model; {hint}"
            f"its layers are {shown}"
        )


def _adaptable(model: nn.Module) -> list[str]:
    """Return the names of layers that PEFT can adapt: linear ones, embeddings, convolutions."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def vocabulary_size(config: ModelConfig) -> int | None:
    """Return the number of tokens that a model has embeddings for, as its config.json says."""
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None
