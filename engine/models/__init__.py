"""One architecture a file; `engine.model` picks by the metadata's architecture name."""
