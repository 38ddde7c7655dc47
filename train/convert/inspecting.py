"""What a published model is, without reading its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from plait.models.lm import num_params
from plait.train.convert.fitting import examined


def describe(folder: Path) -> str:
    """A few lines. Raises ConvertError where it cannot be told."""
    examination = examined(folder)
    source, weights, found = examination.source, examination.weights, examination.match
    tensors = weights.tensors.values()
    dtypes = Counter(tensor.dtype for tensor in tensors)
    size = sum(file.stat().st_size for file in weights.files)
    model = source.model
    rows = {
        "family": f"{source.family.name} ({source.family.architecture})",
        "model": f"{model.num_layers} layers of {model.pattern}, width {model.d_model}, {model.vocab_size} ids",
        "parameters": f"{num_params(model) / 1e6:,.1f}M",
        "tensors": f"{len(weights.tensors)} in {len(weights.files)} {'file' if len(weights.files) == 1 else 'files'}, {size / 1e9:,.2f} GB, "
        + ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items()),
    }
    for what, names in {
        "missing": found.missing,
        "read by nothing": found.unexpected,
        "of another shape": found.misshapen,
        "quantised": found.quantised,
        "of other parts": weights.other,
    }.items():
        rows[what] = ", ".join(sorted(names)) or "none"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
