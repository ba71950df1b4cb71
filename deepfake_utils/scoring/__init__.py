"""From weights and recordings to scores."""
