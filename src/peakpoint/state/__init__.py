"""Live objects to files and back: capture, typed JSON, tensors, restore."""
