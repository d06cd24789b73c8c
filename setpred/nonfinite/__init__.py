"""NaN and infinity in training: policy, location, files that repeat the step."""
