"""What the compilers make of a step, and what its text says: collectives, memory traffic, waits, oddities."""
