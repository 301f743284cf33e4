"""The training step and loop: optimizer step, schedule, callbacks, log, clock, checkpoints."""
