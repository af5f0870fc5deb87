"""World models: the common interface in `base`, planning, and one package for each family."""
