"""What online RLHF is: nouns, verbs, losses, loops and the run directory. Never imports ray, vllm
or deepspeed at import time."""

__version__ = "0.1.0"
