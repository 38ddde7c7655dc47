"""GGUF files, as llama.cpp writes them: one more way in which a published model is kept."""
