"""What a preference row means: files and hub data sets in, typed rows out. Imports no torch."""
