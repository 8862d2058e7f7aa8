"""A model looked at once (survey) and passed once (passes)."""
