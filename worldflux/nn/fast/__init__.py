"""Fast forms of layers; the plain definitions beside this folder choose them."""
