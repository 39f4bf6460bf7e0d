"""Layout of a model directory's tensors, where it differs from the training model's parameters.

transformers holds some parameters in another form than a model directory, and vLLM reads the
directory's: the experts of a mixture are one parameter in training and one tensor per expert in
the directory. In: a model and its parameters' shapes. Out: for each parameter, the tensors that the
directory has of it, as views into it, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the directory as a view into a contiguous parameter."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, parameter: Tensor) -> Tensor:
        """Return the view into `parameter`, which shares its memory where it is contiguous."""
        whole = parameter.contiguous()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


def stored_tensors(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[StoredTensor]]:
    """Return the directory's tensors of each parameter, in the parameters' order.

    The conversion is the one that transformers applied when it loaded the model, reversed. Raises
    ConfigError where it computes new numbers rather than views.
    """
    from transformers.core_model_loading import revert_weight_conversion

    layouts = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    name_of = {_storage(layout): name for name, layout in layouts.items()}
    stored: dict[str, list[StoredTensor]] = {name: [] for name in shapes}
    views = {name: layout.as_subclass(_View) for name, layout in layouts.items()}
    for name, view in revert_weight_conversion(model, views).items():
        if _storage(view) not in name_of:
            raise ConfigError(
                f"policy.model: {type(model).__name__}: {name} is not stored as transformers holds "
                "it, and rayhf can only split or rename parameters when it sends weights"
            )
        stored[name_of[_storage(view)]].append(
            StoredTensor(name, tuple(view.shape), view.stride(), int(view.storage_offset()))
        )
    return stored


class _View(Tensor):
    """A tensor without values that stays a view where transformers would copy it."""

    def contiguous(self, *_: object, **__: object) -> _View:
        return self


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
