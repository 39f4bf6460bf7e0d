"""How a policy gets from its learner to the rollout engines, whatever the transport.

buckets.py              parameters packed into flat, checksummed buckets
lora.py                 the factors of LoRA adapters, and their sum with the base model
export.py               a training model's parameters, gathered and merged for other components
broadcast.py            buckets through a process group of learner and engines
cuda_ipc.py             buckets in the memory of a GPU that learner and engine share
deepspeed_internals.py  what rayhf knows of DeepSpeed's insides
"""
