"""The rollout role: vLLM writes completions with the policy's weights, and takes new weights
between rounds.

env.py       the environment an engine's process needs before vLLM is imported
weights.py   parameters packed into flat, checksummed buckets; used by the learner, too
adapters.py  LoRA's factors, and their sum with the base; used by the learner, too
loop.py      the one thread that owns an engine: what is asked of it, in order, and its futures
driver.py    vLLM itself: sampling parameters in, tokens and log-probs out
transfer.py  how buckets get into vLLM's layers, inside its worker
engine.py    RolloutEngine, what an actor wraps

Nothing is imported here: only the actor's process may import vLLM.
"""
