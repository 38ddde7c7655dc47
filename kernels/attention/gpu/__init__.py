"""The parts of `pallas_gpu`."""
