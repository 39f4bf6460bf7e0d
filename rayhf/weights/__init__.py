"""How a policy gets from learner to engines: buckets, checksums, LoRA, broadcast, CUDA IPC."""
