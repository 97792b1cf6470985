"""What the loop can train: an objective turns a batch into a loss."""
