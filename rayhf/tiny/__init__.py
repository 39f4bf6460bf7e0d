"""The tiny world: models and data of small tasks, built from a seed in a few minutes on a CPU.

    arithmetic.py, words.py, instructions.py, game.py   the tasks: prompts, demonstrations, scoring
                                                        functions; pure Python
    <task>_world.py      their recipes: from a seed to files and measured figures
    tokenizer.py         byte-level BPE with chat roles, the same recipe for every model here
    language_model.py    a small Llama: supervised training, batched sampling
    reward_model.py      a sequence classifier trained on preference pairs
    world.py             `build`: run the recipes, cache the results
    exploitability.py    the exploitability of a policy in a preference game

A rule scorer imports its task's module, so nothing here imports torch at import time.
"""

from rayhf.tiny.world import TASKS, TaskInfo, build

__all__ = ["TASKS", "TaskInfo", "build"]
