"""The parts of `pallas_tpu`."""
