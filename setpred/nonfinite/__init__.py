"""NaN and infinity in training: what to do about them, where they began, files that repeat the step."""
