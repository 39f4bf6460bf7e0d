"""Searches over what a model may write: the tree is data, the model is a pair of callables. Nothing
here knows an engine."""
