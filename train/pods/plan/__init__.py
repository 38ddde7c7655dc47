"""What a training step needs on hardware that is not at hand: memory, operations, traffic between devices, time."""
