"""A model's step in one native call."""
