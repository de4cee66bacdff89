"""What rides along with a rotated model: adapters and draft heads, rotated as their target was."""
