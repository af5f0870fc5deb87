"""Fast implementations of layers; `worldflux.nn` contains their plain definitions and chooses between the two."""
