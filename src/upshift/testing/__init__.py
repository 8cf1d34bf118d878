"""Test helpers that ship with the package: the contract every technique owes. Nothing in production imports this."""
