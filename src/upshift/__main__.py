"""`python -m upshift`."""

from upshift.cli.main import main

main()
