"""The chunk form: products inside a chunk, one state passed between chunks."""

from plait.kernels import chunking, recurrence
from plait.kernels.decay import reference
from plait.kernels.recurrence import RecurrenceCall, Results


def decay(call: RecurrenceCall) -> Results:
    """See `plait.kernels.decay`."""
    length = call.q.shape[1]
    if length == 1:
        return reference.decay(call)
    chunks = recurrence.cut(call)
    o, final_state, entering = recurrence.decayed_attention(chunks, initial_state=call.initial_state)
    stats = recurrence.chunk_stats(chunks, chunks.v, entering, final_state, call) if call.return_stats else None
    return chunking.heads_from_chunks(o, length).astype(call.q.dtype), final_state, stats
