"""Model directories: where a model's files are and what they say of its architecture."""
