"""The loop and what it needs: optimiser, schedule, checkpoints, ranks, journal. Never names MAE."""
