"""The demonstration: a real training that is killed in the middle of a save and loses nothing."""
