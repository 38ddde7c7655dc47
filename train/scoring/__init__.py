"""What a trained model says and how well: held-out rows, scores, continuations."""
