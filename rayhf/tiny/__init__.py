"""The tiny world: everything a campaign needs, made on this machine from a seed in about two
minutes.

arithmetic.py, words.py, instructions.py, game.py   the tasks: prompts, demonstrations, the
                                                    functions that judge. Pure Python.
tokenizer.py              byte-level BPE with chat roles, the same recipe for every model here.
<task>_world.py                               their recipes: from a seed to files and figures.
language_model.py         a small Llama: supervised training, batched sampling.
reward_model.py           a sequence classifier trained on preference pairs.
world.py                  `build`: the recipe of each task, measured, cached, and moved into place
                          whole.

A rule scorer imports its task module from here, so nothing at import time needs torch.
"""

from rayhf.tiny.world import TASKS, TaskInfo, build

__all__ = ["TASKS", "TaskInfo", "build"]
