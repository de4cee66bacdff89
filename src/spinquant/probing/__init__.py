"""What a model that no table knows looks like, found by trying it out; see `probe.py`."""
