"""The models as plain torch modules: tensors in, tensors out. `mae.py` is the masked autoencoder."""
