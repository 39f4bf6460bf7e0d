"""The rollout role: vLLM generates completions with the policy's weights, and takes new weights.

env.py             the environment that an engine's process needs before vLLM is imported
loop.py            the one thread that owns an engine: a queue of calls, and their futures
partials.py        what is known of unfinished completions
vllm_build.py      settings of a vLLM engine
vllm_driver.py     vLLM itself: sampling parameters in, tokens and log-probs out
vllm_worker.py     how buckets get into vLLM's layers, inside its worker
vllm_internals.py  what rayhf knows of vLLM's insides
engine.py          RolloutEngine, what an actor wraps

Nothing is imported here: only the actor's process may import vLLM.
"""
