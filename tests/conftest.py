"""The modules under test lie at the repository's root, which pytest.ini puts on the path."""
from workshop import argv, backbone, children, glue, learned  # noqa: F401  fixtures of all tests
