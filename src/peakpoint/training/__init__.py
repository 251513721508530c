"""The checkpointer in a training loop: save, resume, stop, preempt."""
