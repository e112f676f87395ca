"""Models with gates on their units."""
