"""What is done to an image on its way to the model."""
