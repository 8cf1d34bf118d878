import sys

for arg in sys.argv[1:]:
    key, value = arg.lstrip("-").split("=")
    assert type(globals()[key]) is int
    globals()[key] = int(value)
