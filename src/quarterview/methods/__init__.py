"""The pre-training methods: each one turns a batch into a loss for the training loop."""
