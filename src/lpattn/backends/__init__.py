"""Thin adapters from the backend protocol to kernels. Each module registers its backends through the plugin hook."""
