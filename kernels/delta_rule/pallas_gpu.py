"""The chunk form by the WY transform in Hopper kernels, whose chunks have 64 tokens whatever `chunk_size` is."""

from plait.kernels.recurrence import gpu_driver

unsupported, delta_rule = gpu_driver.unsupported, gpu_driver.run
