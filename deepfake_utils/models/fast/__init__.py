"""The same blocks, computed for a processor: tiles that stay in its cache."""
