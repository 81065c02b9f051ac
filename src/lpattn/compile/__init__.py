"""Rotary embedding under torch.compile: rotations in front of attention are proven, and handed to the backend."""
