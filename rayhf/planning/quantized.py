"""The base of a QLoRA campaign: written once into the run directory, where every actor loads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rayhf.config.models import ModelName
from rayhf.models.hub import local_directory
from rayhf.models.quantized import write_base
from rayhf.planning.preflight import Prepared

BASE = "base"
"""Below run.dir: the policy's model, rounded to what 4 bits represent."""


def with_quantized_base(prepared: Prepared, *, base: Path) -> Prepared:
    """Write the base where policy.lora.quantize asks for it, and start the policy from there.

    The model is unchanged otherwise.
    """
    policy = prepared.config.policy
    if policy.lora is None or policy.lora.quantize is None:
        return prepared
    target = base / prepared.config.run.dir / BASE
    write_base(local_directory(policy.model, base), target, dtype=policy.dtype)
    changed = policy.model_copy(update={"model": ModelName(str(target))})
    return replace(prepared, config=prepared.config.model_copy(update={"policy": changed}))
