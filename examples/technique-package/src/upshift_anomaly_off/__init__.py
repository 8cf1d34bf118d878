"""A technique for upshift, found by the entry point group `upshift.techniques`."""
