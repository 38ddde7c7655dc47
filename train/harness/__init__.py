"""What a benchmark asks of a model: how likely a text goes on with another, how likely a text is, and what is written after one.

`adapter` gives it to EleutherAI's lm-evaluation-harness (extra `eval`); the other modules need no more than plait does.
"""
