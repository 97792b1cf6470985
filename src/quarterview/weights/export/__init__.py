"""Weights of ours, written as others read them."""
