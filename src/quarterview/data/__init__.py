"""Image data: sources, decoding, augmentation, sample order and loading. Imports no model code."""
