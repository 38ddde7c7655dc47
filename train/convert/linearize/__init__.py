"""From softmax attention to linear: which layers and heads, by what students, and the way there."""
