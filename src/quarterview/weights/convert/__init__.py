"""Convert weights of other libraries to the names and configurations of this package."""
