"""The bytes of weights: no streams, and no policy."""
