"""Probe an unknown architecture: find by experiment which rotations leave its function unchanged; see `probe.py`."""
