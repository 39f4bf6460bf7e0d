"""The learner role: pack examples into micro-batches, run the model, step with DeepSpeed, publish
the weights."""
