"""Timing of training steps and matrix products on this machine."""
