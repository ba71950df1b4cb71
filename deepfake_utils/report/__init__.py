"""Tables, pages and pictures for a reader."""
