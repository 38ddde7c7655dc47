"""What layers show to probes, and the places at which a model may be tapped."""
