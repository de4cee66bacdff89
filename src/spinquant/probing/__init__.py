"""Probe an unknown architecture: find by experiment which rotations leave its function unchanged (`probe.py`)."""
