"""A policy whose frozen base weights are in 4 bits (QLoRA, Dettmers et al. 2023), by bitsandbytes.

In: a model directory. Out: a copy of it whose linear layers hold what 4 bits can represent
(`write_base`), and the settings with which transformers loads it in 4 bits without another loss.
Learner, engines and reference all start from that copy, so they agree as with plain LoRA.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.models.source import AS_DATA, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig

BLOCK = 64
"""Weights that share one scale."""


def check_quantize(config: CampaignConfig, model: ModelConfig) -> None:
    """Raise ConfigError where the learner cannot train on a 4-bit base."""
    key = "policy.lora.quantize"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key}: bitsandbytes is not installed; pip install 'rayhf[qlora]'")
    if config.learner.zero_stage == 3:
        raise ConfigError(
            f"{key}: learner.zero_stage 3 would shard the 4-bit weights; expected 0, 1 or 2"
        )
    if any("expert" in name and value for name, value in model.items()):
        raise ConfigError(
            f"{key}: a mixture of experts ({model.get('model_type')}) has its weights in layers "
            "that bitsandbytes does not quantize; leave it out"
        )


def quantization_settings(dtype: Any) -> BitsAndBytesConfig:
    """Return the arguments of from_pretrained that load linear layers in 4 bits."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def use_exact_kernels(model: nn.Module) -> None:
    """Keep the CPU from packing weights for a bfloat16 kernel, which rounds their scales."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def dequantize(weight: Tensor) -> Tensor:
    """Return the weight that a 4-bit parameter stands for; any other weight as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    import bitsandbytes.functional as bnb

    whole: Tensor = bnb.dequantize_4bit(weight.detach(), state)
    return whole


def nearest_nf4(weight: Tensor) -> Tensor:
    """Round a weight to values that 4 bits represent, in its own dtype.

    Quantizing the result again gives the result: the first pass rounds each block's scale to the
    dtype, the second one uses that scale.
    """
    import bitsandbytes.functional as bnb

    for _ in range(2):
        packed, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        weight = bnb.dequantize_4bit(packed, state)
    return weight


def write_base(source: Path, target: Path, *, dtype: str) -> Path:
    """Write the model directory with its linear layers rounded to 4 bits, stored in `dtype`.

    Does nothing where `target` exists. Layers that transformers leaves alone, the output head
    among them, are only cast.
    """
    if target.is_dir():
        return target
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    linear = _linear_weights(source)
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
            continue
        tensors = {}
        with safe_open(file, framework="pt") as stored:
            names = stored.keys()
            for name in names:
                tensor = stored.get_tensor(name).to(getattr(torch, dtype))
                tensors[name] = nearest_nf4(tensor) if name in linear else tensor
        save_file(tensors, partial / file.name, {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    partial.rename(target)
    return target


def _linear_weights(source: Path) -> set[str]:
    """Return the names of the weights that transformers loads in 4 bits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(source), **AS_DATA))
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
