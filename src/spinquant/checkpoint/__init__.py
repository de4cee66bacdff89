"""Read and write model folders: safetensors, checksums, atomic and resumable writing."""
