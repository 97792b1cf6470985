"""Export models to the formats of other libraries."""
