"""Scripts the self-test trains with. They are run as files, never imported."""
