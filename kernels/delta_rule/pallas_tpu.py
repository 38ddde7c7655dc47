"""The chunk form on TPU (Mosaic): the WY form, the triangular inverse by halving; see `tpu_chunk.erase_and_write`."""

from plait.kernels.recurrence import RecurrenceCall, Results, tpu_driver
from plait.kernels.recurrence.tpu_chunk import erase_and_write

unsupported = tpu_driver.unsupported


def delta_rule(call: RecurrenceCall) -> Results:
    """See `plait.kernels.delta_rule`; `chunk_size` means nothing here, `tpu_driver.Tiles` has the kernel's own."""
    return tpu_driver.recurrence(erase_and_write, call)
