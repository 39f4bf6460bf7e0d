"""DeepSpeed settings that a config may pass through, and those that rayhf sets itself."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from rayhf.errors import nearest

_PASSED = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
)
_SECTIONS = {
    "bf16": "learner.dtype",
    "fp16": "learner.dtype",
    "data_types": "learner.dtype",
    "gradient_accumulation_steps": "learner.token_budget",
    "gradient_clipping": "learner.grad_clip",
    "optimizer": "learner.lr, betas and weight_decay",
    "scheduler": "learner.schedule",
    "train_batch_size": "learner.prompts_per_step",
    "train_micro_batch_size_per_gpu": "learner.token_budget",
}
_ZERO = {
    "stage": "learner.zero_stage",
    "offload_optimizer": "learner.offload",
    "cpu_offload": "learner.offload",
    "offload_param": "learner.offload",
    "cpu_offload_param": "learner.offload",
    "contiguous_gradients": "cluster.device",
    "overlap_comm": "cluster.device",
    "reduce_bucket_size": "the model's size",
}
_LAYOUT = ("mics_", "legacy_stage1", "round_robin_gradients", "zenflow", "parameter_alignment")
"""Settings that move the master weights, which checkpoints read, to other places."""


def check_deepspeed(settings: Mapping[str, JsonValue]) -> None:
    """Raise ValueError for a setting that rayhf sets itself, or that DeepSpeed would ignore."""
    for name, value in settings.items():
        if name in _SECTIONS:
            raise ValueError(f"{name} follows from {_SECTIONS[name]}; expected that instead")
        if name not in _PASSED:
            raise ValueError(f"{name} is not passed to DeepSpeed{nearest(name, _PASSED)}")
        if name == "zero_optimization" and not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}; expected a mapping of settings")
    zero = settings.get("zero_optimization")
    for name in zero if isinstance(zero, Mapping) else ():
        where = f"zero_optimization.{name}"
        if name in _ZERO:
            raise ValueError(f"{where} follows from {_ZERO[name]}; expected that instead")
        if name.startswith(_LAYOUT):
            raise ValueError(
                f"{where} changes where DeepSpeed keeps master weights, which checkpoints read; "
                "expected the default"
            )
