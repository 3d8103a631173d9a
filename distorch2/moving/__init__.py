"""Moving bytes: the only room with streams and events."""
