"""The tiny world: everything a campaign needs, made on this machine from a seed in about two minutes.

arithmetic.py, words.py   the two tasks: prompts, demonstrations and the functions that judge. Pure Python.
tokenizer.py              byte-level BPE with chat roles, the same recipe for every model here.
arithmetic_world.py, words_world.py           their recipes: from a seed to files and figures.
language_model.py         a small Llama: supervised training, batched sampling.
reward_model.py           a sequence classifier trained on preference pairs.
world.py                  `build`: the recipe of each task, measured, cached, and moved into place whole.

A rule scorer imports its task module from here, so nothing at import time needs torch.
"""

from rayhf.tiny.world import TaskInfo, build

__all__ = ["TaskInfo", "build"]
