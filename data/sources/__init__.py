"""Where documents come from: files of several kinds, and the text that plait brings."""
