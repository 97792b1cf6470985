"""The method: tensors in, tensors out, nothing but torch. Start with `mae.py`."""
