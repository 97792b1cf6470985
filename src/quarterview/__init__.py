"""Quarterview."""
