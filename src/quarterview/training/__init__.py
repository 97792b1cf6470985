"""Training of any method: loop, optimizer, schedule, checkpoints, ranks and logging."""
