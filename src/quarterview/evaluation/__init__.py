"""Evaluation of a backbone: probes, robustness, embeddings and figures."""
