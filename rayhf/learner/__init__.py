"""The learner role: DeepSpeed behind a synchronous engine, on one rank or several.

packing.py        which examples go through the model together, on which rank
micro_batch.py    examples as tensors for the model and the loss
build.py          a model directory and a config to a DeepSpeed engine
engine.py         LearnerEngine, what an actor wraps
checkpoint.py     checkpoints that any number of ranks can continue
offload.py        tensors out of GPU memory and back
outgoing.py       weights of a sync: gathered, rounded, measured
weight_sender.py  weights by broadcast or by CUDA IPC
"""
