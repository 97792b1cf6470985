"""The loop and what it needs: optimiser, schedule, checkpoints, ranks, logging. Never names MAE."""
