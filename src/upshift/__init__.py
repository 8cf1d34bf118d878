"""upshift: makes PyTorch training faster and cheaper on an unmodified script, and proves it.

The functions are in `upshift.api`.
"""

__version__ = "0.1.0"
