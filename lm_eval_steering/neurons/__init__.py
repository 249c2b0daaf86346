"""Which neurons: the set and its file, recording, selection, calibration."""
