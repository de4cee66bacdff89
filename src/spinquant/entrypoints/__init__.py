"""What the command line and the Python API call: requests validated, then run in memory or as a stream."""
