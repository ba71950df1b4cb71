"""Training of a countermeasure: one loop, what it needs beside it, and runs that go on where they stopped."""
