"""Records at rest: manifest, events, keys, names, amounts and metrics, and how a record is sealed and read."""
