"""What a run will cost, before it has happened: bytes, time, and what is lost when it is interrupted."""
