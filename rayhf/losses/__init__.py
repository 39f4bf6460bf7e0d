"""Losses are functions of tensors: tensors in, (loss, metrics) out; no model, no config object."""
