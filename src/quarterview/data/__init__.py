"""Images in: sources, decoding, augmentation, order and the loader. Never imports a model."""
