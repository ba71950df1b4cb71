"""What a model listens to, and what could be told without listening."""
