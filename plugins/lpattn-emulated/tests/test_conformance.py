"""`lpattn check` runs the same without pytest."""

from lpattn.testing import BackendTests


class TestEmulatedBackend(BackendTests):
    """Everything that lpattn asks of a backend, one test for each check."""

    backend = "fp8_emulated"
