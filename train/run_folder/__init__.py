"""A run folder's numbers: metrics, events and probe arrays, written while training and read by the report.

    metrics.jsonl             one object a line: step, tokens, seconds, then group/name values
    events.jsonl              one object a line: step, kind, layer, head, value, threshold, message
    probes/layers.json        what each layer is (index, mixer, kind, num_heads) and first_k
    probes/step_00000050.npz  float32 arrays [L], [L, H] or [L, H, K], padded with NaN to the widest layer
    probes/attention.npz      attention pictures of one held-out text: maps [L, H, T, T] float16, tokens [T], step
    tensorboard/              the same scalars for TensorBoard
    owner/00000003.json       which process writes to the folder
    unsaved-1/                numbers of a try that was killed before its first checkpoint

Every file is strict JSON or NumPy: a value that is not finite is written as null and read back as NaN. Lines are appended and
flushed one at a time; whole files are written beside their final name and renamed, so a killed run leaves nothing half written
but, at worst, one unfinished last line, which readers skip and say so.
"""
