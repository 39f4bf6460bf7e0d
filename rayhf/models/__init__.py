"""Model directories, what they say of an architecture, and the forward pass over a model."""
