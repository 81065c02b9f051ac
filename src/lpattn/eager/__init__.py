"""Interception of SDPA calls inside a model, in eager mode and while torch.compile traces it."""
