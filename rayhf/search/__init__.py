"""Tree searches over generated text: the tree is data, the model is a pair of callables."""
