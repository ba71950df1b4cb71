"""The detector as a service: watched, and learning from its mistakes (extra `serve`)."""
