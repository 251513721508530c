"""What a run will cost, before it has happened: bytes, money, and what is lost when it is interrupted."""
