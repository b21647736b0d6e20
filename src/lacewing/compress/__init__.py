"""Compression with calibration: prune and round a model so that its outputs change least."""
