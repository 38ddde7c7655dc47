"""The chunk form in Hopper kernels, whose chunks have 64 tokens whatever `chunk_size` is."""

from plait.kernels.recurrence import gpu_driver

unsupported, decay = gpu_driver.unsupported, gpu_driver.run
