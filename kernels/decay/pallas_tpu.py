"""The chunk form on TPU (Mosaic): scores times pairwise decays; see `tpu_chunk.decay_and_add`."""

from plait.kernels.recurrence import RecurrenceCall, Results, tpu_driver
from plait.kernels.recurrence.tpu_chunk import decay_and_add

unsupported = tpu_driver.unsupported


def decay(call: RecurrenceCall) -> Results:
    """See `plait.kernels.decay`; `chunk_size` means nothing here, `tpu_driver.Tiles` has the kernel's own."""
    return tpu_driver.recurrence(decay_and_add, call)
